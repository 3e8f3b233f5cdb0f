"""What an objective may ask for, and the base of its settings: validated without torch."""

import difflib
import enum
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from remit_megatron.errors import UserError
from remit_megatron.ops.choices import Compared, Routing


class Need(enum.Enum):
    """Something that an objective takes of `TokenStats` beside the student's NLL and the mask."""

    REF_NLL = "ref_nll"
    """The frozen reference's NLL of each label: `ref_nll`."""
    DISTRIBUTION = "distribution"
    """The reference's distribution over the vocabulary, of which `kl` is made; see `Distribution`."""
    ENTROPY = "entropy"
    """The entropy of the reference's distribution at the temperature of `Distribution`: `ref_entropy`."""
    AGREEMENT = "agreement"
    """Whether the reference's most probable token is the label: `ref_agrees`."""
    ROUTING = "routing"
    """A choice among the tokens by what the reference says of them, which ENTROPY and AGREEMENT are needed for:
    `routed`; see `Routing`. It is made before the student runs, over the whole step."""
    GLOBAL_SELECTION = "global_selection"
    """A selection among all tokens of the step by their gap, which REF_NLL is needed for: `selected`; see
    `global_share`. It costs a forward pass of the student."""
    DOCUMENTS = "documents"
    """The documents of a packed sample: `segment_ids`."""


OF_THE_DISTRIBUTION = frozenset({Need.DISTRIBUTION, Need.ENTROPY, Need.AGREEMENT})
"""What follows from the reference's whole distribution, and not from its NLL of the label."""
OF_THE_REFERENCE = OF_THE_DISTRIBUTION | {Need.REF_NLL}


class Distribution(NamedTuple):
    """How the reference's distribution is compared with the student's."""

    temperature: float = 1.0
    """Divides both models' logits, for the comparison only."""
    top_k: int = 0
    """Above 0: over so many tokens, the reference's most probable, and one bucket for all others."""
    compare: Compared = "forward"
    """"forward": KL(reference || student); "reverse": KL(student || reference); "top1": the student's NLL of the
    reference's most probable token, at temperature 1."""


class ObjectiveSettings(BaseModel):
    """Base of every objective: a frozen value whose fields are its settings in the recipe.

    Raises UserError, in place of pydantic's error, for settings that do not fit: one line that names objective.<key>.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that runs existed without: at their defaults they are no part of the identity."""

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
    def routing(self) -> Routing | None:
        """With Need.ROUTING: how tokens are chosen. None without."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether anything of the frozen reference is needed."""
        return bool(self.needs & OF_THE_REFERENCE)

    def identity(self) -> dict[str, Any]:
        """Every setting, defaults written out: to write one out in the recipe changes nothing."""
        settings = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name not in self.LATER or getattr(self, name) != field.default
        }
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


def _selectable_or_none(value: float) -> float:
    if value != 0.0 and not 1e-6 <= value <= 1.0:
        raise ValueError("must be in [0, 1], and above 0 at least 1e-6")
    return value


ShareOfOne = Annotated[float, AfterValidator(_share_of_one)]
Selectable = Annotated[float, AfterValidator(_selectable)]
SelectableOrNone = Annotated[float, AfterValidator(_selectable_or_none)]
PositiveFloat = Annotated[float, AfterValidator(_positive)]
NotNegative = Annotated[int, AfterValidator(_not_negative)]

_TYPES = {"float_type": "float", "int_type": "int", "bool_type": "bool", "string_type": "str"}


def _first_problem(error: ValidationError, cls: type[ObjectiveSettings]) -> str:
    """What is wrong first, in one line. An unknown key goes first: misspelt, it is also why another one is missing."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = [name for name in cls.model_fields if name not in ("name", "import_path")]
        return f"unknown key objective.{key} for '{cls.model_fields['name'].default}'{nearest(key, known)}"
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


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the known one that it resembles, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f": known are {', '.join(known)}" if known else ": it has no settings"
