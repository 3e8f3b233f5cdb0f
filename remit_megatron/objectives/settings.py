"""What a recipe says of its objective, validated without torch: settings, what the objective needs, its metrics.

The computation is a subclass, in a file of the objective's name, that adds `__call__`. An objective is a line in
`OBJECTIVES`, or a class of any package named by `objective.import_path`; its settings may stand beside its computation
or, where a recipe of it is to be read without importing torch, here.
"""

import difflib
import enum
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from remit_megatron.errors import UserError

OBJECTIVES = {
    "ntp": "remit_megatron.objectives.ntp:NTP",
    "remit": "remit_megatron.objectives.remit:Remit",
    "rho1": "remit_megatron.objectives.rho1:Rho1",
    "kd": "remit_megatron.objectives.kd:KD",
}
"""Where the computation of each objective is, as `module:Class`."""


class Need(enum.Enum):
    """Something that an objective takes of `TokenStats` beside the student's NLL and the mask."""

    REF_NLL = "ref_nll"
    """The frozen reference's NLL of each label: `ref_nll`."""
    DISTRIBUTION = "distribution"
    """The reference's distribution over the vocabulary, of which `kl` is made; see `Distribution`."""
    ENTROPY = "entropy"
    """The entropy of the reference's distribution: `ref_entropy`."""
    GLOBAL_SELECTION = "global_selection"
    """A selection among all tokens of the step by their gap, which REF_NLL is needed for: `selected`; see
    `global_share`. It costs a forward pass of the student."""
    DOCUMENTS = "documents"
    """The documents of a packed sample: `segment_ids`."""


OF_THE_REFERENCE = frozenset({Need.REF_NLL, Need.DISTRIBUTION, Need.ENTROPY})


class Distribution(NamedTuple):
    """How the reference's distribution is compared with the student's."""

    temperature: float = 1.0
    """Divides both models' logits, for the comparison only."""
    top_k: int = 0
    """Above 0: over so many tokens, the reference's most probable, and one bucket for all others."""


class ObjectiveSettings(BaseModel):
    """Base of every objective: a frozen value whose fields are its settings in the recipe.

    Raises UserError, in place of pydantic's error, for settings that do not fit: one line that names objective.<key>.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    name: str
    """Of the objective; a class fixes it by a Literal with a default."""
    import_path: str | None = None
    """`package.module:Class`, for an objective of one's own."""

    @property
    def needs(self) -> frozenset[Need]:
        """What each call is given; may depend on the settings."""
        return frozenset()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that each call returns, in the order in which they are written."""
        return ("loss", "nll")

    @property
    def by_sample(self) -> bool:
        """Whether loss and metrics are sums over samples, each a function of that sample's scores: then
        compute.loss_head = "sequence_chunks" may call the objective once a sample."""
        return False

    @property
    def remark(self) -> str | None:
        """What the log says about the settings at the start."""
        return None

    @property
    def distribution(self) -> Distribution:
        """With Need.DISTRIBUTION: how it is compared."""
        return Distribution()

    @property
    def global_share(self) -> float | None:
        """With Need.GLOBAL_SELECTION: the share of the step's tokens to select. None without."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether anything of the frozen reference is needed."""
        return bool(self.needs & OF_THE_REFERENCE)

    def identity(self) -> dict[str, Any]:
        """Every setting, defaults written out: to write one out in the recipe changes nothing."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        if self.import_path is None:
            del settings["import_path"]
        return settings

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {"name": self.name, **given}

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, data: Any, handler: ModelWrapValidatorHandler["ObjectiveSettings"]) -> "ObjectiveSettings":
        try:
            return handler(data)
        except ValidationError as error:
            raise UserError(_first_problem(error, cls)) from None


def _share_of_one(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError("must be in [0, 1]")
    return value


def _positive(value: float) -> float:
    if not 0.0 < value < float("inf"):
        raise ValueError("must be positive")
    return value


def _not_negative(value: int) -> int:
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


def _selectable(value: float) -> float:
    if not 1e-6 <= value <= 1.0:
        raise ValueError("must be in (0, 1], at least 1e-6")
    return value


ShareOfOne = Annotated[float, AfterValidator(_share_of_one)]
PositiveFloat = Annotated[float, AfterValidator(_positive)]
NotNegative = Annotated[int, AfterValidator(_not_negative)]


class NTPSettings(ObjectiveSettings):
    """Next-token prediction. No settings."""

    name: Literal["ntp"] = "ntp"

    @property
    def by_sample(self) -> bool:
        return True


class RemitSettings(ObjectiveSettings):
    """The paper's objective. With another reference it is the SFT-guided ablation."""

    name: Literal["remit"] = "remit"
    epsilon: ShareOfOne = 0.2
    """Half-width of the clip: weights lie in [1 - epsilon, 1 + epsilon]."""
    clip: bool = True
    """False is the paper's ablation without clipping: weights lie in (0, 2)."""
    centering: Literal["sample", "document"] = "sample"
    """The mean gap is taken over a whole packed sample, or over each document in it."""
    shuffle: bool = False
    """Control: each sample's weights go to random tokens of it, so that only the choice of tokens is lost."""
    shuffle_seed: int = 1234
    """With the step and the sample it fixes the permutation."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REF_NLL} | ({Need.DOCUMENTS} if self.centering == "document" else set()))

    @property
    def metrics(self) -> tuple[str, ...]:
        clipped = ("clipped_low", "clipped_high") if self.clip else ()
        return ("loss", "nll", "ref_nll", "gap", "weight", "weight_sq", *clipped)

    @property
    def by_sample(self) -> bool:
        return True


class Rho1Settings(ObjectiveSettings):
    """Selective language modelling (RHO-1, Equations 3 to 5), by the signed excess loss nll - ref_nll."""

    name: Literal["rho1"] = "rho1"
    share: Annotated[float, AfterValidator(_selectable)] = 0.8
    """Share of unmasked tokens that is kept; counts are rounded up."""
    scope: Literal["sequence", "microbatch", "global"] = "sequence"
    """Where tokens compete: within each packed sample, within a microbatch (which depends on how the batch is cut), or
    within the step's whole batch (which costs a forward pass of the student more)."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REF_NLL} | ({Need.GLOBAL_SELECTION} if self.scope == "global" else set()))

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "nll", "ref_nll", "gap", "selected")

    @property
    def by_sample(self) -> bool:
        return self.scope == "sequence"

    @property
    def remark(self) -> str | None:
        if self.scope != "microbatch":
            return None
        return "objective.scope = 'microbatch': which tokens are selected depends on batch.microbatch_samples and ranks"

    @property
    def global_share(self) -> float | None:
        return self.share if self.scope == "global" else None


class KDSettings(ObjectiveSettings):
    """kd_alpha KL(reference || student) + (1 - kd_alpha) NLL, a mean over unmasked tokens."""

    name: Literal["kd"] = "kd"
    kd_alpha: ShareOfOne = 1.0
    """Share of the KL; 1 is the paper's objective, 0 is NTP."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the KL, which is not scaled up by its square."""
    top_k: NotNegative = 0
    """Above 0: the KL is over so many tokens, the reference's most probable, and one bucket for all others: a lower
    bound of the KL over the vocabulary, which 0 stands for."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.DISTRIBUTION})

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "nll", "kl")

    @property
    def distribution(self) -> Distribution:
        return Distribution(temperature=self.temperature, top_k=self.top_k)


BuiltIn = Annotated[NTPSettings | RemitSettings | Rho1Settings | KDSettings, Field(discriminator="name")]
"""Settings that are read without the objective's computation."""
_BUILT_IN: TypeAdapter[Any] = TypeAdapter(BuiltIn)
_BUILT_IN_NAMES = {cls.model_fields["name"].default for cls in get_args(get_args(BuiltIn)[0])}


def parse_objective(settings: Any) -> ObjectiveSettings:
    """The settings of a recipe's [objective] section: `name`, or `import_path`, and that objective's own fields.

    Raises UserError, naming objective.<key>, for a missing or unknown name, an unknown key, a value of another type or
    out of range, and an import_path that leads to no objective.
    """
    if isinstance(settings, ObjectiveSettings):
        return settings
    if not isinstance(settings, Mapping):
        raise UserError(f"objective must be a section with objective.name, got {settings!r}")
    if settings.get("import_path") is not None:
        return located(settings["import_path"])(**settings)
    if "name" not in settings:
        raise UserError(f"objective.name is missing: choose one of {', '.join(OBJECTIVES)}")
    name = settings["name"]
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective.name '{name}'{_nearest(str(name), list(OBJECTIVES))}")
    if name not in _BUILT_IN_NAMES:
        return located(OBJECTIVES[name])(**settings)
    parsed: ObjectiveSettings = _BUILT_IN.validate_python(dict(settings))
    return parsed


def located(import_path: str) -> type[ObjectiveSettings]:
    """The class of an objective, imported. Raises UserError where the path does not lead to one."""
    where = f"objective.import_path = {import_path!r}"
    if not isinstance(import_path, str) or import_path.count(":") != 1:
        raise UserError(f"{where}: write it as package.module:Class")
    module_name, _, class_name = import_path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(f"{where}: {error}: install the package, or add its folder to PYTHONPATH") from None
    if found is None:
        raise UserError(f"{where}: {module_name} has no {class_name}")
    fits = isinstance(found, type) and issubclass(found, ObjectiveSettings)
    if not fits or not any("__call__" in vars(one) for one in found.__mro__):
        raise UserError(
            f"{where}: {class_name} must be a subclass of remit_megatron.objectives.ObjectiveSettings with __call__"
        )
    return found


def check_by_sample(objective: Any) -> None:
    """Raises UserError for an objective that does not say that its loss is a sum over samples."""
    if not objective.by_sample:
        raise UserError(
            f"compute.loss_head = 'sequence_chunks' cannot serve objective '{objective.name}', whose loss is no sum "
            "over samples, each a function of its NLL: use 'logits'"
        )


_TYPES = {"float_type": "float", "int_type": "int", "bool_type": "bool", "string_type": "str"}


def _first_problem(error: ValidationError, cls: type[ObjectiveSettings]) -> str:
    """What is wrong first, in one line. An unknown key goes first: misspelt, it is also why another one is missing."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = [name for name in cls.model_fields if name not in ("name", "import_path")]
        return f"unknown key objective.{key} for '{cls.model_fields['name'].default}'{_nearest(key, known)}"
    if kind == "missing":
        return f"missing key objective.{key}"
    if kind in _TYPES or (kind == "literal_error" and not isinstance(value, str)):
        return f"objective.{key} must be of type {_TYPES.get(kind, 'str')}, got {value!r}"
    if kind == "literal_error":
        choices = get_args(cls.model_fields[key].annotation)
        return f"objective.{key} must be one of {', '.join(map(str, choices))}, got '{value}'"
    if kind == "value_error":
        got = f", got {value}" if key else ""
        return f"objective{'.' * bool(key)}{key} {problem['msg'].removeprefix('Value error, ')}{got}"
    return f"objective.{key}: {problem['msg']}, got {value!r}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f": known are {', '.join(known)}" if known else ": it has no settings"
