"""What a recipe says of its objective, validated without torch: settings, what the objective needs, its metrics.

The computation is a subclass, in a file of the objective's name, that adds `__call__`. An objective is a line in
`OBJECTIVES`, or a class of any package named by `objective.import_path`; its settings may stand beside its computation
or, where a recipe of it is to be read without importing torch, here.
"""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, TypeAdapter

from remit_megatron.errors import UserError
from remit_megatron.objectives.needs import (
    Distribution,
    Need,
    NotNegative,
    ObjectiveSettings,
    PositiveFloat,
    Selectable,
    ShareOfOne,
    nearest,
)
from remit_megatron.objectives.settings_routed import SwitchSettings, TRKDSettings
from remit_megatron.outside import quote

OBJECTIVES = {
    "ntp": "remit_megatron.objectives.ntp:NTP",
    "remit": "remit_megatron.objectives.remit:Remit",
    "rho1": "remit_megatron.objectives.rho1:Rho1",
    "kd": "remit_megatron.objectives.kd:KD",
    "switch": "remit_megatron.objectives.switch:Switch",
    "trkd": "remit_megatron.objectives.trkd:TRKD",
}
"""Where the computation of each objective is, as `module:Class`."""


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
    share: Selectable = 0.8
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
    """kd_alpha KL + (1 - kd_alpha) NLL, a mean over unmasked tokens."""

    LATER: ClassVar[frozenset[str]] = frozenset({"direction", "scale"})

    name: Literal["kd"] = "kd"
    kd_alpha: ShareOfOne = 1.0
    """Share of the KL; 1 is the paper's objective, 0 is NTP."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the KL."""
    top_k: NotNegative = 0
    """Above 0: the KL is over so many tokens, the reference's most probable, and one bucket for all others: a lower
    bound of the KL over the vocabulary, which 0 stands for."""
    direction: Literal["forward", "reverse"] = "forward"
    """"forward": KL(reference || student), the paper's; "reverse": KL(student || reference)."""
    scale: Literal["none", "tau_squared"] = "none"
    """"tau_squared": the KL is multiplied by the squared temperature."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.DISTRIBUTION})

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "nll", "kl")

    @property
    def distribution(self) -> Distribution:
        return Distribution(temperature=self.temperature, top_k=self.top_k, compare=self.direction)


BuiltIn = Annotated[
    NTPSettings | RemitSettings | Rho1Settings | KDSettings | SwitchSettings | TRKDSettings,
    Field(discriminator="name"),
]
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
        raise UserError(f"objective must be a section with objective.name, got {quote(settings)}")
    if settings.get("import_path") is not None:
        return located(settings["import_path"])(**settings)
    if "name" not in settings:
        raise UserError(f"objective.name is missing: choose one of {', '.join(OBJECTIVES)}")
    name = settings["name"]
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"unknown objective.name '{quote(name)}'{nearest(quote(name), list(OBJECTIVES))}")
    if name not in _BUILT_IN_NAMES:
        return located(OBJECTIVES[name])(**settings)
    parsed: ObjectiveSettings = _BUILT_IN.validate_python(dict(settings))
    return parsed


def located(import_path: str) -> type[ObjectiveSettings]:
    """The class of an objective, imported. Raises UserError where the path does not lead to one."""
    where = f"objective.import_path = '{quote(import_path)}'"
    module_name, colon, class_name = import_path.partition(":") if isinstance(import_path, str) else ("", "", "")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise UserError(f"{where}: write it as package.module:Class")
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
