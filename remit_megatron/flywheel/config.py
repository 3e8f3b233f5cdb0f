"""WHEEL.toml: base, mid-training recipe, post-training stages, arms, rounds, and what is benchmarked when."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from remit_megatron import toml
from remit_megatron.errors import UserError
from remit_megatron.posttrain.contract import DPO, RL, SFT, Chat, Engine, keep_name
from remit_megatron.sections import NonNegative, Positive, Section

NAME = re.compile(r"[A-Za-z0-9_]+")
REFERENCE = re.compile(r"(sft|dpo|rl)(@0\.\d*[1-9])?")


class Mid(Section):
    """Mid-training, by `remit train`."""

    recipe: str
    """The recipe (TOML). The wheel sets run, model.init, objective and reference.path; what else is in [reference]
    goes with the rounds that have one."""
    set: dict[str, Any] = Field({})
    """Overrides as those of `remit train --set`: key to value."""
    nproc: Positive = 1
    """Ranks; under SLURM, ranks a node."""
    nodes: Positive = 1
    """Under SLURM."""


class Arm(Section):
    """A way of mid-training in rounds 1, 2, ..., with the same post-training as every other arm."""

    objective: dict[str, Any] = Field({"name": "remit"})
    """As a recipe's section of that name."""
    reference: str | None = None
    """The stage of the arm's previous round that guides: sft, dpo, rl, or such as "rl@0.1", what rl kept at 10% of its
    steps. Default: the last stage; none where the objective is ntp."""
    rounds: Positive | None = None
    """Default: the wheel's."""
    set: dict[str, Any] = Field({})
    """Further overrides of the recipe, in this arm only."""

    @model_validator(mode="after")
    def _consistent(self) -> "Arm":
        if self.reference is not None and not REFERENCE.fullmatch(self.reference):
            raise ValueError(f"reference = '{self.reference}': sft, dpo, rl, or one with a share such as rl@0.1")
        if self.reference is not None and not self.guided:
            raise ValueError("reference goes with an objective other than ntp")
        return self

    @property
    def guided(self) -> bool:
        return bool(self.objective.get("name") != "ntp")


class Stage(Section):
    """What the stages of post-training share; beside it, a section has the keys of its kind."""

    data: tuple[str, ...] = Field(min_length=1)
    """Files, as `remit post` takes them."""
    seed: NonNegative = 0
    keep: tuple[float, ...] = ()
    """Shares of the steps at which the model is kept."""
    engine: Engine | None = None
    """Default: the wheel's."""
    chat: Chat | None = None
    """Default: the wheel's."""
    allow_code_execution: bool = False


class SFTStage(SFT, Stage):
    """[sft] of a wheel."""


class DPOStage(DPO, Stage):
    """[dpo] of a wheel."""


class RLStage(RL, Stage):
    """[rl] of a wheel."""


STAGES: dict[str, type[Section]] = {"sft": SFT, "dpo": DPO, "rl": RL}
"""Stages of post-training in their order, with what makes up the settings of each."""


class Benchmark(Section):
    """An evaluation after some stages: `remit benchmark`, a command of one's own, or the KL to another model."""

    LATER: ClassVar[frozenset[str]] = frozenset({"kl_to", "samples"})

    after: tuple[Literal["base", "mid", "sft", "dpo", "rl"], ...] = Field(min_length=1)
    suite: Literal["base", "post", "extended"] | None = None
    """Of `remit benchmark`."""
    arguments: tuple[str, ...] = ()
    """More arguments of `remit benchmark`, or of the command."""
    command: tuple[str, ...] = ()
    """A program and its arguments, in place of a suite; `{python}` is the interpreter of the wheel. It gets
    `--model FOLDER --output FILE` and writes a JSON object of figures, such as `{"accuracy": 0.31}`, there."""
    data: tuple[str, ...] = ()
    """Files whose content decides the result, the command's own among them: a change of them evaluates again."""
    kl_to: str | None = None
    """A stage, such as r0-rl, or `given rl`: KL(its model || the model) over the tokens of the first set in the
    recipe's data.eval, by `remit analyze tokens`; Figure 6b of the paper."""
    samples: Positive = 64
    """Of `kl_to`: so many of the set's samples."""

    @model_validator(mode="after")
    def _consistent(self) -> "Benchmark":
        if sum(map(bool, (self.suite, self.command, self.kl_to))) != 1:
            raise ValueError("give suite or command, or kl_to, and one of them only")
        if self.kl_to and (self.arguments or self.data):
            raise ValueError("arguments and data do not go with kl_to")
        return self


class Wheel(Section):
    """The file."""

    wheel: str = Field(min_length=1)
    """Folder of the wheel. Paths in this file are relative to the working directory."""
    base: str
    """The base model, a Hugging Face folder with the chat template; its tokenizer files go with every model."""
    rounds: Positive = 1
    """Rounds of guided mid-training, after round 0."""
    start: Literal["base", "previous"] = "base"
    """Weights that mid-training of rounds 2, 3, ... starts from: the base's, or the arm's mid-trained model before."""
    given: dict[str, str] = Field({})
    """Models to start from in place of round 0: stage (rl, sft, rl@0.1) to Hugging Face folder."""
    mid: Mid
    engine: Engine = Engine()
    """Of the stages of post-training."""
    chat: Chat = Chat()
    sft: SFTStage | None = None
    dpo: DPOStage | None = None
    rl: RLStage | None = None
    arms: dict[str, Arm] = Field({"remit": Arm()})
    benchmarks: dict[str, Benchmark] = Field({})

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of post-training that the file has, in their order."""
        found = {name: getattr(self, name) for name in STAGES}
        return {name: settings for name, settings in found.items() if settings is not None}

    @property
    def folder(self) -> Path:
        return Path(self.wheel)

    def reference_of(self, arm: Arm) -> str | None:
        """The stage, with its share, that guides an arm; None for plain next-token prediction."""
        return (arm.reference or list(self.stages)[-1]) if arm.guided else None

    @model_validator(mode="after")
    def _consistent(self) -> "Wheel":
        if not self.stages:
            raise ValueError("no stage of post-training: give [sft], [dpo] or [rl]")
        for what, names in (("arms", self.arms), ("benchmarks", self.benchmarks)):
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(f"{what}.{name}: letters, digits and _ make a name")
        for name in self.given:
            if not REFERENCE.fullmatch(name):
                raise ValueError(f"given.{name}: sft, dpo, rl, or one with a share such as rl@0.1")
        for name, arm in self.arms.items():
            reference = self.reference_of(arm)
            stage = (reference or list(self.stages)[-1]).partition("@")[0]
            self._check_share(name, reference)
            if self.given and reference and reference not in self.given:
                raise ValueError(f"arms.{name} is guided by {reference}, which is not in [given]")
            if stage not in self.stages and (not self.given or (arm.rounds or self.rounds) > 1):
                raise ValueError(f"arms.{name} is guided by {reference}, and there is no stage [{stage}]")
        return self

    def _check_share(self, arm: str, reference: str | None) -> None:
        stage, _, share = (reference or "").partition("@")
        if share and stage in self.stages:
            kept = {keep_name(one) for one in self.stages[stage].keep}
            if keep_name(float(share)) not in kept:
                raise ValueError(f"arms.{arm} is guided by {reference}: put {share} into {stage}.keep")


def load_wheel(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Wheel:
    """Read the file and apply `key.sub=value` overrides. Raises UserError naming the key or the file."""
    settings = toml.read(path, "wheel")
    for one in overrides:
        toml.override(settings, one)
    try:
        return Wheel.model_validate(with_tuples(settings))
    except ValidationError as error:
        raise UserError(f"wheel {path}: {toml.first_problem(error, Wheel)}") from None
    except UserError as error:  # of a section that post-training knows
        raise UserError(f"wheel {path}: {error}") from None


def with_tuples(value: Any) -> Any:
    """TOML's arrays as the sections, which are frozen, hold them."""
    if isinstance(value, dict):
        return {key: with_tuples(one) for key, one in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value
