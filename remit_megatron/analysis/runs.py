"""Runs against a baseline, from their metrics.jsonl: tokens and device hours to its quality, speed, gradient norms.

What Figures 1a, 8, 12 and 16 of the paper show.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.analysis.plots import plot_curves
from remit_megatron.data.files import make_folder, write_atomically
from remit_megatron.errors import UserError

WARM_UP_STEPS = 3
"""Steps at the start of a run that timing leaves out: they allocate memory and build caches."""
LOWER_IS_BETTER = ("nll", "loss")
MS_PER_HOUR = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """One run. None: the run has no such figure."""

    run: str
    steps: int
    tokens: int
    device_hours: float
    """Of the steps; saving, evaluation and restarts are not in it."""
    final: float
    """The metric at the last step that has it."""
    best: float
    reached_tokens: int | None
    """Tokens at the first evaluation that is as good as the target; None: none is."""
    reached_device_hours: float | None
    tokens_speedup: float | None
    """The baseline's tokens to the target over this run's."""
    hours_speedup: float | None
    step_ms: float
    """Median."""
    steps_per_s_over_baseline: float
    score_share: float | None
    """The reference's part of a step's time, median."""
    grad_norm: dict[str, float] | None
    """Quantiles 0.05, 0.5, 0.95 of the norms before clipping."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; half a line at its end, which a run may just be writing, is left out.

    Raises UserError where there is none or a line is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): name the folder of a run that has trained"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON lines ({error}): restore the file") from None
    if not lines:
        raise UserError(f"{path}: holds no step: wait for the run's first")
    return lines


def compare_runs(baseline: Path, runs: list[Path], metric: str, target: float | None) -> list[RunFigures]:
    """The baseline's figures first. target: what is to be reached; None: the baseline's last value of the metric.

    Raises UserError for a run without metrics, or without this one.
    """
    lines = {run: read_metrics(run) for run in dict.fromkeys([baseline, *runs])}
    names = _names(list(lines))
    series = {run: _series(found, metric, run) for run, found in lines.items()}
    goal = series[baseline][-1][2] if target is None else target
    sign = 1.0 if lower_is_better(metric) else -1.0
    base = _reached(series[baseline], goal, sign)
    base_ms = _median_ms(lines[baseline])
    figures = []
    for run, found in lines.items():
        values = [value for _, _, value in series[run]]
        at = _reached(series[run], goal, sign)
        step_ms = _median_ms(found)
        figures.append(
            RunFigures(
                run=names[run],
                steps=len(found),
                tokens=found[-1]["tokens"],
                device_hours=float(device_hours(found)[-1]),
                final=values[-1],
                best=min(values, key=lambda x: sign * x),
                reached_tokens=at[0] if at else None,
                reached_device_hours=at[1] if at else None,
                tokens_speedup=base[0] / at[0] if base and at else None,
                hours_speedup=base[1] / at[1] if base and at else None,
                step_ms=step_ms,
                steps_per_s_over_baseline=base_ms / step_ms,
                score_share=_median_share(found),
                grad_norm=_quantiles([x["grad_norm"] for x in found if x.get("grad_norm") is not None]),
            )
        )
    return figures


def write_runs(baseline: Path, runs: list[Path], metric: str, target: float | None, output: Path) -> str:
    """Write runs.json and runs.png into `output`; returns a table. Raises UserError as `compare_runs`."""
    figures = compare_runs(baseline, runs, metric, target)
    make_folder(output, "--output")
    text = json.dumps({"metric": metric, "runs": [asdict(one) for one in figures]}, indent=1)
    write_atomically(output / "runs.json", (text + "\n").encode())
    lines = {run: read_metrics(run) for run in dict.fromkeys([baseline, *runs])}
    names = _names(list(lines))
    by_tokens, by_hours, norms = {}, {}, {}
    for run, found in lines.items():
        tokens, hours, values = (np.array(column) for column in zip(*_series(found, metric, run), strict=True))
        by_tokens[names[run]], by_hours[names[run]] = (tokens, values), (hours, values)
        steps = [(x["tokens"], x["grad_norm"]) for x in found if x.get("grad_norm") is not None]
        norms[names[run]] = tuple(np.array(column) for column in zip(*steps, strict=True)) if steps else ([], [])
    panels: Any = {"To the baseline's quality, in tokens": by_tokens, "In device hours": by_hours}
    panels["Gradient norm before clipping"] = norms
    plot_curves(
        output / "runs.png",
        panels,
        dict(zip(panels, [("tokens", metric), ("device hours", metric), ("tokens", "norm")], strict=True)),
    )
    return table(figures, metric)


def table(figures: list[RunFigures], metric: str) -> str:
    """Markdown, a row a run."""
    head = ["run", "tokens", metric, "reached at tokens", "faster in tokens", "device hours", "faster in hours"]
    head += ["steps/s over baseline", "reference's share", "gradient norm"]
    rows = [head, ["---"] * len(head)]
    for one in figures:
        rows.append(
            [
                one.run,
                f"{one.tokens:,}",
                f"{one.final:.4f}",
                "never" if one.reached_tokens is None else f"{one.reached_tokens:,}",
                _times(one.tokens_speedup),
                "-" if one.reached_device_hours is None else f"{one.reached_device_hours:.4g}",
                _times(one.hours_speedup),
                f"{one.steps_per_s_over_baseline:.2f}",
                "-" if one.score_share is None else f"{one.score_share:.0%}",
                "-" if one.grad_norm is None else f"{one.grad_norm['0.5']:.3g}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def lower_is_better(metric: str) -> bool:
    return metric.rsplit("/", 1)[-1] in LOWER_IS_BETTER


def device_hours(lines: list[dict[str, Any]]) -> np.ndarray:
    """Device hours after each step: a run may go on with another number of ranks. Lines without one count as one."""
    return np.cumsum([line["step_ms"] * line.get("ranks", 1) for line in lines]) / MS_PER_HOUR


def _series(lines: list[dict[str, Any]], metric: str, run: Path) -> list[tuple[int, float, float]]:
    """(tokens, device hours, value) of the steps that have the metric."""
    hours = device_hours(lines)
    found = [(x["tokens"], float(h), float(x[metric])) for x, h in zip(lines, hours, strict=True) if _has(x, metric)]
    if not found:
        known = sorted({key for line in lines for key in line if key.startswith("eval/")})
        raise UserError(
            f"{run / 'metrics.jsonl'}: no step has '{metric}'; evaluations in it: {', '.join(known) or 'none'}"
        )
    return found


def _has(line: dict[str, Any], metric: str) -> bool:
    return isinstance(line.get(metric), int | float)


def _reached(series: list[tuple[int, float, float]], goal: float, sign: float) -> tuple[int, float] | None:
    return next(((tokens, hours) for tokens, hours, value in series if sign * value <= sign * goal), None)


def _median_ms(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["step_ms"] for line in lines[WARM_UP_STEPS:] or lines)


def _median_share(lines: list[dict[str, Any]]) -> float | None:
    timed = [x["score_ms"] / x["step_ms"] for x in lines[WARM_UP_STEPS:] or lines if "score_ms" in x]
    return statistics.median(timed) if timed else None


def _quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"{q:g}": float(x) for q, x in zip((0.05, 0.5, 0.95), np.quantile(values, (0.05, 0.5, 0.95)), strict=True)}


def _names(runs: list[Path]) -> dict[Path, str]:
    """The folders' last names; whole paths where two share one."""
    short = [run.resolve().name for run in runs]
    return dict(zip(runs, short if len(set(short)) == len(short) else map(str, runs), strict=True))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
