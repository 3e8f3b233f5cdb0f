"""Training objectives. A new one is a file here, a line in `settings.OBJECTIVES` and a recipe; or a class of another
package, and `objective.import_path` in the recipe.

Names that compute are imported when they are used, so that settings can be read without torch.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from remit_megatron.objectives.needs import Distribution, Need, ObjectiveSettings
from remit_megatron.objectives.settings import OBJECTIVES, check_by_sample, located, parse_objective
from remit_megatron.ops.choices import Routing

if TYPE_CHECKING:
    from remit_megatron.objectives.base import LossSum, Objective, Ratio, TokenStats
    from remit_megatron.objectives.kd import KD
    from remit_megatron.objectives.ntp import NTP
    from remit_megatron.objectives.remit import Remit
    from remit_megatron.objectives.rho1 import Rho1
    from remit_megatron.objectives.switch import Switch
    from remit_megatron.objectives.trkd import TRKD

_COMPUTING = {
    **dict.fromkeys(("LossSum", "Objective", "Ratio", "TokenStats"), "base"),
    **{"KD": "kd", "NTP": "ntp", "Remit": "remit", "Rho1": "rho1", "Switch": "switch", "TRKD": "trkd"},
}

__all__ = [
    "KD",
    "NTP",
    "OBJECTIVES",
    "TRKD",
    "Distribution",
    "LossSum",
    "Need",
    "Objective",
    "ObjectiveSettings",
    "Ratio",
    "Remit",
    "Rho1",
    "Routing",
    "Switch",
    "TokenStats",
    "build_objective",
    "check_by_sample",
    "parse_objective",
]


def __getattr__(name: str) -> Any:
    if name not in _COMPUTING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_COMPUTING[name]}"), name)


def build_objective(settings: ObjectiveSettings | Mapping[str, Any]) -> "Objective":
    """The objective that settings, or a recipe's [objective] section, describe. Raises what `parse_objective` does."""
    parsed = parse_objective(settings)
    cls = located(parsed.import_path or OBJECTIVES[parsed.name])
    built = parsed if isinstance(parsed, cls) else cls(**parsed.model_dump())
    return cast("Objective", built)
