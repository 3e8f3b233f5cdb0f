"""The recipe: one strict TOML file that describes a run completely.

`load_recipe` reads a file and overrides, refuses unknown keys with the nearest known one, and returns a frozen
`Recipe`. Nothing else in the package reads settings from the environment or from global arguments.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from remit_megatron import toml
from remit_megatron.errors import UserError
from remit_megatron.objectives import Objective, build_objective
from remit_megatron.objectives.base import check_by_sample
from remit_megatron.ops.implementation import Implementation

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


NOT_IDENTITY = {"run", "parallel", "compute", "evaluation", "checkpoint", "watchdog", "logging"}
"""Sections that do not decide what a run computes, but for `compute.precision`."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    """The student. Shapes may be left out where `init` names a checkpoint, which carries its own."""

    init: str | None = None
    """Initial weights: a checkpoint folder, a run folder (its latest), or a Hugging Face folder; none: random."""
    preset: str | None = None
    """Published sizes by name: `olmo2_1b`, `smollm3_3b`, `youtu_2b`. What `init` has must agree with them."""
    num_layers: Positive | None = None
    hidden_size: Positive | None = None
    ffn_hidden_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_query_groups: Positive | None = None
    """KV heads (GQA); default: num_attention_heads."""
    kv_channels: Positive | None = None
    """Width of a head; default: hidden_size / num_attention_heads."""
    vocab_size: Positive | None = None
    """Rows of the embedding, exactly; padding for tensor parallelism is added and masked by the program."""
    tied_embeddings: bool | None = None
    """Share the input embedding and the output head; default false."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary embedding; default 10000."""
    norm_epsilon: float | None = Field(None, gt=0)
    """Default 1e-5."""
    init_std: float = Field(0.02, gt=0)
    implementation: Literal["local", "transformer_engine"] = "local"
    """Layer spec. `transformer_engine` fails at start where it is not installed."""


class Source(Section):
    path: str
    """Prefix of a .bin/.idx pair."""
    weight: float = Field(1.0, gt=0)
    """Share of samples, relative to the other sources."""


class Data(Section):
    sequence_length: Positive
    train: tuple[Source, ...] = Field(min_length=1)
    eval: dict[str, str] = {}
    """Held-out sets: name to prefix of a .bin/.idx pair."""
    seed: NonNegative = 1234
    """Order of documents and samples; `seed` of the recipe is for the initial weights only."""
    eod_id: NonNegative | None = None
    """Token that ends a document; default: the manifest's. Needed by document centring, masks and resets."""
    document_mask: bool = False
    """Attention stays inside a document. Positions still run over the whole sample."""
    eod_mask_loss: bool = False
    """No loss where the input is the EOD token: the first token of a document is not predicted from the one before."""
    cache_dir: str | None = None
    """Where sample indices are kept; default: a folder `.index` beside each dataset."""
    loader: Literal["default", "dali"] = "default"
    """`default` assembles steps ahead in a thread; `dali` runs them through NVIDIA DALI. Both give the same tensors."""
    prefetch_steps: Positive = 2
    """Steps that are assembled ahead."""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one, that the datasets must have been made with."""

    @field_validator("train", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Parallel(Section):
    tensor: Positive = 1
    sequence: bool = False
    """Shard norms and residuals over the tensor-parallel ranks along the sequence."""
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    """Model chunks on each pipeline rank."""
    context: Positive = 1
    distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class Queue(Section):
    """A scorer, `remit score RECIPE --follow`, runs ahead of the run and leaves each step's scores in a folder."""

    folder: str | None = None
    """On a file system that run and scorer share; default: `queue` in the run's folder."""
    ahead_steps: Positive = 8
    """Steps that the scorer may be ahead. So many lie in the folder, 4 bytes a token; the scorer removes used ones."""
    timeout_s: float = Field(60.0, ge=1)
    """A scorer that has not moved for so long counts as gone. Reading files late, a shared file system adds to it; with
    fallback = "stop" it also has to cover the scorer's start."""
    fallback: Literal["online", "stop"] = "online"
    """Without a scorer the run scores online until one comes back. `stop`: the reference is not loaded, and the run
    stops when it has waited for `timeout_s`."""
    parallel: Parallel | None = None
    """Layout of the scorer; default: the run's."""
    microbatch_samples: Positive | None = None
    """Of the scorer; default: the run's."""


class Reference(Section):
    """The frozen model whose confidence weights the tokens."""

    path: str
    """Checkpoint, run or Hugging Face folder, as `model.init`. It may differ from the student in width and depth."""
    head_chunk_tokens: Positive = 2048
    """Tokens whose reference logits exist at one time."""
    merge_microbatches: Positive = 1
    """Microbatches that the reference scores in one pass."""
    precision: Literal["same", "fp8"] = "same"
    """`fp8`: the layers' linears multiply in 8 bits. What that does to scores and weights is measured at the start."""
    allow_added_tokens: bool = False
    """Accept a reference whose tokenizer has other added tokens than the student's: ids differ where a text spells one.
    """
    cuda_graph: bool = False
    """Replay the reference's pass as a CUDA graph, checked against the pass itself at the start and every 200 passes.
    For one GPU a model (no tensor, pipeline or context parallelism). Its activations stay allocated."""
    scores: str | None = None
    """Folder of scores made by `remit score`, read in place of running the model."""
    check_samples: NonNegative = 4
    """Samples that are scored again at the start, to compare with `scores`. 0: the model is not loaded at all."""
    write_scores: str | None = None
    """Folder that keeps the scores made online, rounded; samples that are scored already are read from it."""
    round_scores: bool = False
    """Round scores made online to the steps in which `remit score` stores them."""

    queue: Queue | None = None
    """Scores made beside the run by a scorer of its own."""

    @property
    def rounds(self) -> bool:
        """Whether the scores that weights are made of are rounded."""
        return self.round_scores or self.scores is not None or self.write_scores is not None


class Batch(Section):
    global_batch_tokens: Positive
    microbatch_samples: Positive = 1


class Optimizer(Section):
    peak_lr: float = Field(gt=0)
    min_lr: float = Field(1e-7, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad_norm: float = Field(1.0, ge=0)
    """0: no clipping."""
    max_bad_steps: Positive = 5
    """The run stops after so many steps in a row whose gradient norm is not finite; each of them is skipped."""


class Schedule(Section):
    train_tokens: Positive
    warmup_tokens: NonNegative = 0
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    wsd_decay_tokens: Positive | None = None
    """Length of the final decay of `wsd`."""
    wsd_shape: Literal["linear", "cosine", "minus_sqrt"] = "linear"

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if self.warmup_tokens >= self.train_tokens:
            raise ValueError("warmup_tokens must be smaller than train_tokens")
        if (self.decay == "wsd") != (self.wsd_decay_tokens is not None):
            raise ValueError("wsd_decay_tokens goes with decay = 'wsd', and only with it")
        if self.wsd_decay_tokens and self.wsd_decay_tokens + self.warmup_tokens > self.train_tokens:
            raise ValueError("warmup_tokens + wsd_decay_tokens must not exceed train_tokens")
        return self


class Compute(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 keeps float32 master weights and reduces gradients in float32. auto: bf16 on CUDA, fp32 on CPU."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps one activation a layer and computes the rest again in backward."""
    loss_implementation: Implementation = "auto"
    """Of the token NLL and of FP8 rounding; `remit doctor` says what auto is here."""
    loss_head: Literal["logits", "sequence_chunks"] = "logits"
    """`sequence_chunks` forms the student's logits one sample at a time, so [s, b, V] never exists: for long contexts.
    Its gradients are formed in forward, and the head's is rounded once a sample."""
    threads: Positive | None = None
    """CPU threads a rank; default: the machine's cores over its local ranks."""
    collective_timeout_s: Positive = 3600
    """Of torch's own. On CUDA it aborts the process without more, so the watchdog's limits are to be shorter."""


class Evaluation(Section):
    every_steps: NonNegative = 0
    """0: at the end only."""
    samples: Positive = 64
    """Of each held-out set, at most."""


class Checkpoint(Section):
    every_steps: NonNegative = 0
    """0: at the end, and when asked to stop, only."""
    keep: Positive = 2
    """Newest checkpoints that stay; older ones are removed once a newer one is complete."""
    asynchronous: bool = False
    """Write in a background process while training goes on."""


class Watchdog(Section):
    """A run that makes no progress is ended with exit code 86, after every rank has written its stacks."""

    step_timeout_s: NonNegative = 600
    """A step may take so long. 0: no watchdog."""
    slow_timeout_s: Positive = 1800
    """Until the first step is complete, in an evaluation, in a checkpoint and at the end: so long, each time."""


class Logging(Section):
    every_steps: Positive = 1
    """Progress lines and external loggers; metrics.jsonl always has every step."""
    tensorboard: bool = False
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "remit"
    tokens_every_steps: NonNegative = 0
    """NLL, reference and weight of each token of a few held-out samples go to `tokens/` of the run folder as Parquet,
    and a histogram of the weights to the loggers. 0: never."""
    tokens_samples: Positive = 4
    """The first so many samples."""
    tokens_source: str | None = None
    """Name of the held-out set in data.eval; default: the first."""


class Recipe(Section):
    """A whole run."""

    run: str = Field(min_length=1)
    """Folder of the run: resolved recipe, metrics, checkpoints, log."""
    seed: NonNegative = 1234
    model: Model = Model()
    reference: Reference | None = None
    objective: dict[str, Any] = {"name": "ntp"}
    """`name` and that objective's own settings; see remit_megatron/objectives."""
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

    def build_objective(self) -> Objective:
        return build_objective(dict(self.objective))

    @property
    def global_batch_samples(self) -> int:
        return self.batch.global_batch_tokens // self.data.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps; the last one may pass train_tokens by less than a batch."""
        return -(-self.schedule.train_tokens // self.batch.global_batch_tokens)

    def fingerprint(self) -> str:
        """Of `identity`, twelve hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: a run folder belongs to one such set.

        Layout, device, logging, limits and checkpoint cadence may change between two starts of a run; the rest may not.
        """
        settings = self.model_dump(exclude=NOT_IDENTITY)
        objective = self.build_objective()
        # With its defaults: to write one out changes nothing.
        settings["objective"] = {"name": objective.name, **dataclasses.asdict(cast(Any, objective))}
        settings["data"].pop("eval")
        for key in ("cache_dir", "loader", "prefetch_steps"):
            settings["data"].pop(key)
        settings["batch"].pop("microbatch_samples")
        settings["compute"] = {"precision": self.compute.precision}
        if self.reference:
            settings["reference"] = self.reference.path
            settings["reference_precision"] = self.reference.precision
            settings["rounded_scores"] = self.reference.rounds
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
        objective = self.build_objective()
        if objective.needs_reference and self.reference is None:
            raise UserError(f"objective.name = '{objective.name}' needs a [reference] section with a path")
        if not objective.needs_reference and self.reference is not None:
            raise UserError(
                f"[reference] is given but objective.name = '{objective.name}' uses none: remove one of them"
            )
        if self.compute.loss_head == "sequence_chunks":
            check_by_sample(objective)
        self._check_scores(objective)
        if self.logging.tokens_every_steps and not self.data.eval:
            raise UserError("logging.tokens_every_steps records held-out samples: name a set in data.eval")
        if self.logging.tokens_source not in (None, *self.data.eval):
            raise UserError(
                f"logging.tokens_source = '{self.logging.tokens_source}' is not in data.eval "
                f"({', '.join(self.data.eval) or 'which is empty'})"
            )
        if self.optimizer.min_lr > self.optimizer.peak_lr:
            raise UserError("optimizer.min_lr must not exceed optimizer.peak_lr")
        self._check_layout()
        return self

    def _check_scores(self, objective: Objective) -> None:
        reference = self.reference
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
        if getattr(objective, "needs_reference_hidden", False):
            key = "scores" if reference.scores else "write_scores" if reference.write_scores else "queue"
            raise UserError(
                f"reference.{key} is for one number a token, and objective.name = '{objective.name}' needs the "
                "reference's whole distribution: remove it"
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
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}: {toml.first_problem(error, Recipe)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load_recipe` reads back to an equal recipe."""
    return toml.dumps(recipe.model_dump(exclude_none=True))
