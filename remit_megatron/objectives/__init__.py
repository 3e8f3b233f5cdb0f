"""Training objectives. A new one is a file here, a line in `OBJECTIVES` and a recipe."""

import dataclasses
import difflib
from typing import Any, get_origin, get_type_hints

from remit_megatron.errors import UserError
from remit_megatron.objectives.base import LossSum, Objective, Ratio, TokenStats
from remit_megatron.objectives.kd import KD
from remit_megatron.objectives.ntp import NTP
from remit_megatron.objectives.remit import Remit
from remit_megatron.objectives.rho1 import Rho1

OBJECTIVES: dict[str, type[Any]] = {"ntp": NTP, "remit": Remit, "rho1": Rho1, "kd": KD}

__all__ = ["KD", "NTP", "OBJECTIVES", "LossSum", "Objective", "Ratio", "Remit", "Rho1", "TokenStats", "build_objective"]


def build_objective(settings: dict[str, Any]) -> Objective:
    """The objective that a recipe's [objective] section describes: `name`, and that objective's own fields.

    Raises UserError, naming objective.<key>, for a missing or unknown name, an unknown key, a value of another type,
    and whatever the objective itself refuses.
    """
    if "name" not in settings:
        raise UserError(f"objective.name is missing: choose one of {', '.join(OBJECTIVES)}")
    name = settings["name"]
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective.name '{name}'{_nearest(str(name), list(OBJECTIVES))}")
    cls = OBJECTIVES[name]
    known = [field.name for field in dataclasses.fields(cls)]
    types = get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in known:
            raise UserError(f"unknown key objective.{key} for '{name}'{_nearest(key, known)}")
        values[key] = _typed(f"objective.{key}", value, types[key])
    objective: Objective = cls(**values)
    return objective


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f": known are {', '.join(known)}" if known else ": it has no settings"


def _typed(key: str, value: Any, expected: Any) -> Any:
    """`value`, if TOML's type fits the field's; an integer fits a float, a boolean fits nothing but a boolean."""
    if get_origin(expected) is not None:  # a Literal: the objective names the choices
        expected = str
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{key} must be of type {expected.__name__}, got {value!r}")
    return float(value) if expected is float else value
