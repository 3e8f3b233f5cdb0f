"""The recipe: one strict TOML file that describes a run completely.

`load_recipe` reads a file and overrides, refuses unknown keys with the nearest known one, and returns a frozen
`Recipe`. Nothing else in the package reads settings from the environment or from global arguments.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from remit_megatron import toml
from remit_megatron.errors import UserError
from remit_megatron.objectives.needs import OF_THE_DISTRIBUTION, ObjectiveSettings
from remit_megatron.objectives.settings import NTPSettings, check_by_sample, parse_objective
from remit_megatron.outside import NAME_BYTES, impossible_name, quote
from remit_megatron.sections import (
    Batch,
    Checkpoint,
    Compute,
    Data,
    Evaluation,
    Logging,
    Model,
    NonNegative,
    Optimizer,
    Parallel,
    Queue,
    Reference,
    Schedule,
    Section,
    Source,
    Watchdog,
    without_later,
)

if TYPE_CHECKING:
    from remit_megatron.objectives import Objective

__all__ = [
    "Batch",
    "Checkpoint",
    "Compute",
    "Data",
    "Evaluation",
    "Logging",
    "Model",
    "Optimizer",
    "Parallel",
    "Queue",
    "Recipe",
    "Reference",
    "Schedule",
    "Section",
    "Source",
    "Watchdog",
    "dump_toml",
    "load_recipe",
    "parse_recipe",
]

NOT_IDENTITY = {"run", "parallel", "compute", "evaluation", "checkpoint", "watchdog", "logging"}
"""Sections that do not decide what a run computes, but for `compute.precision`."""


class Recipe(Section):
    """A whole run."""

    run: str = Field(min_length=1)
    """Folder of the run: resolved recipe, metrics, checkpoints, log."""
    seed: NonNegative = 1234
    model: Model = Model()
    reference: Reference | None = None
    objective: Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(parse_objective)] = NTPSettings()
    """`name`, or `import_path`, and that objective's own settings; see remit_megatron/objectives."""
    data: Data
    parallel: Parallel = Parallel()
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    watchdog: Watchdog = Watchdog()
    logging: Logging = Logging()

    def build_objective(self) -> "Objective":
        """The objective itself, which computes: its file is imported, and torch with it."""
        from remit_megatron.objectives import build_objective

        return build_objective(self.objective)

    @property
    def global_batch_samples(self) -> int:
        return self.batch.global_batch_tokens // self.data.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps; the last one may pass train_tokens by less than a batch."""
        return -(-self.schedule.train_tokens // self.batch.global_batch_tokens)

    @property
    def kept_checkpoints(self) -> int:
        """Checkpoints that `checkpoint.keep` does not count, at the end of the run."""
        every = self.checkpoint.keep_every_tokens
        return self.train_steps * self.batch.global_batch_tokens // every if every else 0

    def keeps_checkpoint(self, tokens: int) -> bool:
        """Whether the step that ends at so many tokens has a checkpoint that `checkpoint.keep` does not count."""
        every = self.checkpoint.keep_every_tokens
        return every > 0 and tokens // every > (tokens - self.batch.global_batch_tokens) // every

    def fingerprint(self) -> str:
        """Of `identity`, twelve hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: a run folder belongs to one such set.

        Layout, device, logging, limits and checkpoint cadence may change between two starts of a run; the rest may not.
        """
        settings = without_later(self, self.model_dump(exclude=NOT_IDENTITY))
        settings["objective"] = self.objective.identity()
        settings["data"].pop("eval")
        for key in ("cache_dir", "loader", "prefetch_steps"):
            settings["data"].pop(key)
        settings["batch"].pop("microbatch_samples")
        settings["compute"] = {"precision": self.compute.precision}
        if self.reference:
            settings["reference"] = self.reference.path
            settings["reference_precision"] = self.reference.precision
            settings["rounded_scores"] = self.reference.rounds
            if self.reference.distribution:
                settings["kept_distribution"] = self.reference.distribution
        return settings

    def for_scorer(self) -> "Recipe":
        """This recipe in the layout of `reference.queue`'s scorer. Raises UserError where that layout does not fit."""
        assert self.reference is not None
        assert self.reference.queue is not None
        queue, settings = self.reference.queue, self.model_dump()
        settings["parallel"] = (queue.parallel or self.parallel).model_dump()
        settings["batch"]["microbatch_samples"] = queue.microbatch_samples or self.batch.microbatch_samples
        return parse_recipe(settings, where="reference.queue")

    @property
    def tokens_source(self) -> str:
        """The held-out set whose tokens are recorded."""
        return self.logging.tokens_source or next(iter(self.data.eval))

    @property
    def queue_folder(self) -> Path:
        """Where a scorer leaves its scores."""
        assert self.reference is not None
        assert self.reference.queue is not None
        return Path(self.reference.queue.folder or Path(self.run) / "queue")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        objective = self.objective
        if objective.needs_reference and self.reference is None:
            raise UserError(f"objective.name = '{objective.name}' needs a [reference] section with a path")
        if not objective.needs_reference and self.reference is not None:
            raise UserError(
                f"[reference] is given but objective.name = '{objective.name}' uses none: remove one of them"
            )
        if self.compute.loss_head == "sequence_chunks":
            check_by_sample(objective)
        self._check_scores()
        if self.logging.tokens_every_steps and not self.data.eval:
            raise UserError("logging.tokens_every_steps records held-out samples: name a set in data.eval")
        if self.logging.tokens_source not in (None, *self.data.eval):
            raise UserError(
                f"logging.tokens_source = '{self.logging.tokens_source}' is not in data.eval "
                f"({', '.join(self.data.eval) or 'which is empty'})"
            )
        if 0 < self.checkpoint.keep_every_tokens < self.batch.global_batch_tokens:
            raise UserError(
                f"checkpoint.keep_every_tokens = {self.checkpoint.keep_every_tokens} is less than a step's "
                f"batch.global_batch_tokens = {self.batch.global_batch_tokens}: every step would be kept"
            )
        if self.optimizer.min_lr > self.optimizer.peak_lr:
            raise UserError("optimizer.min_lr must not exceed optimizer.peak_lr")
        self._check_layout()
        return self

    def _check_scores(self) -> None:
        reference, objective = self.reference, self.objective
        top_k = objective.distribution.top_k
        if reference is not None and reference.distribution and top_k not in (0, reference.distribution):
            raise UserError(
                f"reference.distribution = {reference.distribution} and objective.top_k = {top_k}: give one number of "
                "tokens, or leave objective.top_k out"
            )
        if reference is None or not (reference.scores or reference.write_scores or reference.queue):
            return
        if reference.scores and reference.write_scores:
            raise UserError("reference.scores and reference.write_scores: give one of them, to read or to fill")
        if reference.scores and reference.queue:
            raise UserError(
                "reference.scores and reference.queue: give one of them, scores made ahead or beside the run"
            )
        if reference.queue and 0 < self.watchdog.step_timeout_s <= reference.queue.timeout_s:
            raise UserError(
                f"reference.queue.timeout_s = {reference.queue.timeout_s:g} is not under watchdog.step_timeout_s = "
                f"{self.watchdog.step_timeout_s:g}: a step that waits for a scorer would be taken for a hang"
            )
        if objective.needs & OF_THE_DISTRIBUTION and not reference.distribution:
            key = "scores" if reference.scores else "write_scores" if reference.write_scores else "queue"
            raise UserError(
                f"reference.{key} carries one number a token, and objective.name = '{objective.name}' needs the "
                "reference's distribution: set reference.distribution to the number of its tokens to keep"
            )

    def _check_layout(self) -> None:
        p, s = self.parallel, self.data.sequence_length
        if self.batch.global_batch_tokens % s:
            raise UserError(
                f"batch.global_batch_tokens = {self.batch.global_batch_tokens} is no multiple of "
                f"data.sequence_length = {s}"
            )
        if p.context > 1 and s % (2 * p.context):
            raise UserError(
                f"data.sequence_length = {s} does not divide by 2 x parallel.context = {2 * p.context} (zigzag slices)"
            )
        if p.sequence and p.tensor == 1:
            raise UserError("parallel.sequence needs parallel.tensor > 1")
        if p.sequence and (s // p.context) % p.tensor:
            raise UserError(
                f"data.sequence_length / parallel.context = {s // p.context} does not divide by parallel.tensor = "
                f"{p.tensor}, which parallel.sequence needs"
            )
        if p.virtual_pipeline > 1 and p.pipeline == 1:
            raise UserError("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
        if p.overlap_param_gather and not (p.distributed_optimizer and p.overlap_grad_reduce):
            raise UserError(
                "parallel.overlap_param_gather needs parallel.distributed_optimizer and parallel.overlap_grad_reduce"
            )


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values in TOML syntax, or bare strings).

    Paths in a recipe are relative to the working directory. Raises UserError naming the key or the file.
    """
    settings = toml.read(Path(path), "recipe")
    for override in overrides:
        toml.override(settings, override)
    return parse_recipe(settings, where=str(path))


def parse_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate settings as read from TOML. Raises UserError naming the first wrong key."""
    if (found := impossible_name(settings)) is not None:
        key, text = found
        raise UserError(
            f"{where}: {quote(key, 100)} = {quote(text, 100)}: has a NUL, or a name of more than {NAME_BYTES} bytes, "
            "which no file can have: choose another"
        )
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}: {toml.first_problem(error, Recipe)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load_recipe` reads back to an equal recipe."""
    return toml.dumps(recipe.model_dump(exclude_none=True))
