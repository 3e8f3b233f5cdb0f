"""The figures of benchmarks.step: medians and spreads of steps and of their ratios, and what they must reach."""

import statistics
from typing import Any, NamedTuple

LIMITS: dict[str, tuple[str, float | None, float]] = {
    "remit over ntp": ("<=", 1.37, 1.33),
    "remit-fp8 over ntp": ("<=", None, 1.20),
    "remit-graph over ntp": ("<=", None, 1.33),
    "remit-scores over ntp": ("<=", 1.02, 1.00),
    "ntp mfu": (">=", 0.40, 0.50),
}
"""Of the shape olmo2-1b on a GPU: direction, what it must reach, what it aims at."""
CPU_LIMITS: dict[str, tuple[str, float | None, float]] = {
    "remit over ntp": ("<=", 1.45, 1.33),
    "remit-scores over ntp": ("<=", 1.03, 1.00),
    "remit-queued over ntp": ("<=", 1.03, 1.00),
    "kd-kept over ntp": ("<=", 1.06, 1.03),
    "switch-kept over ntp": ("<=", 1.06, 1.03),
    "switch over ntp": ("<=", 1.33, 1.33),
    "scoring rate over ntp": (">=", 2.5, 3.0),
}
"""Of the shape small on a CPU, by processor time."""


class Times(NamedTuple):
    """Seconds of a step, and of its part that the reference took."""

    wall: float
    cpu: float
    score_wall: float
    score_cpu: float


def figures(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians and spreads of (step, its scoring), and of ratios of neighbouring steps."""
    found: dict[str, Any] = {
        "step_seconds": {arm: spread([step for step, _ in pairs]) for arm, pairs in times.items()},
        "ratios": {},
        "reference_share": {arm: spread([s / t for t, s in pairs]) for arm, pairs in times.items() if pairs[0][1]},
    }
    if "ntp" in times:
        ntp = [step for step, _ in times["ntp"]]
        for arm in sorted(times.keys() - {"ntp"}):
            pairwise = zip(times[arm], ntp, strict=True)
            found["ratios"][f"{arm} over ntp"] = spread([step / base for (step, _), base in pairwise])
        if "remit" in times:
            scoring = [score for _, score in times["remit"]]
            # Of one device's tokens a second; and device hours with those of the scoring counted in.
            found["scoring rate over ntp"] = spread([b / s for s, b in zip(scoring, ntp, strict=True)])
            if "remit-scores" in times:
                three = zip(times["remit-scores"], scoring, ntp, strict=True)
                found["remit-scores and their scoring over ntp"] = spread([(t + s) / b for (t, _), s, b in three])
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def verdict(value: float, sign: str, must: float | None, aim: float) -> dict[str, Any]:
    def reached(limit: float) -> bool:
        return value <= limit if sign == "<=" else value >= limit

    found = {"value": value, "aim": f"{sign} {aim}", "aim_met": reached(aim)}
    return found if must is None else found | {"must": f"{sign} {must}", "met": reached(must)}
