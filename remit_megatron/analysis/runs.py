"""Runs against a baseline, from their metrics.jsonl: tokens and device hours to its quality, speed, gradient norms.

What Figures 1, 8, 12, 15 and 16 of the paper show.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.analysis.plots import plot_curves
from remit_megatron.analysis.trajectories import PREFIX, add_to_lines, find_points, trajectory_table, write_trajectories
from remit_megatron.data.files import make_folder, write_atomically
from remit_megatron.errors import UserError
from remit_megatron.outside import quote

WARM_UP_STEPS = 3
"""Steps at the start of a run that timing leaves out: they allocate memory and build caches."""
LOWER_IS_BETTER = ("nll", "loss", "kl", "ref_nll", "gap_mean", "step_ms", "score_ms", "data_ms", "wait_ms")
HIGHER_IS_BETTER = ("exact_match", "accuracy", "tokens_per_s", "mfu")
"""Last parts of names of metrics."""
MS_PER_HOUR = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """One run. None: the run has no such figure."""

    run: str
    steps: int
    tokens: int
    device_hours: float | None
    """Of the run's own steps; saving, evaluation, restarts, and scores made elsewhere are not in it. None where
    metrics.jsonl does not say on how many ranks."""
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

    Raises UserError where there is none, a line is damaged, or steps do not rise by one from the first on: hours are a
    sum over all of a run's steps.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): name the folder of a run that has trained"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: is no text ({error}): restore the file") from None
    lines = [_line(path, i, line) for i, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1)]
    if not lines:
        raise UserError(f"{path}: holds no step: wait for the run's first")
    for number, line in enumerate(lines, 1):
        if line["step"] != number:
            raise UserError(
                f"{path}: line {number} is of step {quote(line['step'], 40)}: steps are missing, doubled or out of "
                "order, so neither tokens nor hours to a figure can be told: restore the file"
            )
    return lines


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        tokens, step_ms, _ = line["tokens"], line["step_ms"], line["step"]
        if not (tokens > 0 and 0 < step_ms < math.inf):
            raise ValueError(f"tokens = {tokens}, step_ms = {step_ms}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: line {number} is no valid JSON of a step ({error!r}): restore the file") from None
    return dict(line)


def compare_runs(
    lines: dict[str, list[dict[str, Any]]], metric: str, target: float | None = None, better: str | None = None
) -> tuple[list[RunFigures], float]:
    """Figures of runs by name, the first of them the baseline, and what was to be reached.

    target: None for the baseline's last value of the metric. better: "lower" or "higher"; None where the metric's name
    tells. Raises UserError for a run without the metric, and for a metric or target that cannot be compared.
    """
    if target is not None and not math.isfinite(target):
        raise UserError(f"--target {target}: a number is expected")
    sign = _sign(metric, better)
    series = {name: _series(found, metric, name) for name, found in lines.items()}
    baseline = next(iter(lines))
    goal = series[baseline][-1][2] if target is None else target
    base = _reached(series[baseline], goal, sign)
    base_ms = _median_ms(lines[baseline])
    figures = []
    for name, found in lines.items():
        values = [value for _, _, value in series[name]]
        at = _reached(series[name], goal, sign)
        hours, step_ms = device_hours(found), _median_ms(found)
        figures.append(
            RunFigures(
                run=name,
                steps=len(found),
                tokens=found[-1]["tokens"],
                device_hours=None if hours is None else float(hours[-1]),
                final=values[-1],
                best=min(values, key=lambda x: sign * x),
                reached_tokens=at[0] if at else None,
                reached_device_hours=at[1] if at else None,
                tokens_speedup=base[0] / at[0] if base and at else None,
                hours_speedup=base[1] / at[1] if base and at and base[1] is not None and at[1] is not None else None,
                step_ms=step_ms,
                steps_per_s_over_baseline=base_ms / step_ms,
                score_share=_median_share(found),
                grad_norm=_quantiles([x["grad_norm"] for x in found if _has(x, "grad_norm")]),
            )
        )
    return figures, goal


def write_runs(
    runs: list[Path],
    metric: str,
    output: Path,
    *,
    target: float | None = None,
    better: str | None = None,
    results: list[Path] | None = None,
) -> str:
    """Write runs.json and runs.png into `output`; returns a table. The first run is the baseline.

    results: folders below which lie results of `remit benchmark`, whose figures become metrics `benchmark/SUITE/NAME`
    of the steps whose checkpoints they are of; then also trajectories.json and .png, and their table.

    Raises UserError as `compare_runs` and `find_points`, before anything is written.
    """
    names = _names(runs)
    lines = {name: read_metrics(run) for run, name in names.items()}
    points, others = find_points(results or [], names)
    add_to_lines(points, lines)
    figures, goal = compare_runs(lines, metric, target, better)
    by_tokens, by_hours, norms = {}, {}, {}
    for name, found in lines.items():
        tokens, hours, values = (np.array(column) for column in zip(*_series(found, metric, name), strict=True))
        by_tokens[name] = tokens, values
        if hours[0] is not None:
            by_hours[name] = hours.astype(float), values
        steps = [(x["tokens"], x["grad_norm"]) for x in found if _has(x, "grad_norm")]
        if steps:
            norms[name] = np.array([x for x, _ in steps]), np.array([y for _, y in steps])
    panels = {"To the baseline's quality, in tokens": by_tokens, "In device hours": by_hours}
    panels["Gradient norm before clipping"] = norms
    axes = [("tokens", metric), ("device hours", metric), ("tokens", "norm")]
    picture = plot_curves(panels, dict(zip(panels, axes, strict=True)))
    content = {"metric": metric, "target": goal, "better": "lower" if _sign(metric, better) > 0 else "higher"}
    content["runs"] = [asdict(one) for one in figures]
    make_folder(output, "--output")
    write_atomically(output / "runs.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(output / "runs.png", picture)
    notes = [f"To reach: {content['better']} than or equal to {goal:g}. Hours are of the runs' own steps; scores made"]
    notes[0] += " ahead or beside a run are not in them."
    if points:
        write_trajectories(points, output)
        notes = [*notes, *others, "", trajectory_table(points)]
    unknown = [one.run for one in figures if one.device_hours is None]
    if unknown:
        notes.append(f"metrics.jsonl does not say on how many ranks it ran: {', '.join(unknown)}")
    return "\n".join([table(figures, metric), "", *notes])


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
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def device_hours(lines: list[dict[str, Any]]) -> np.ndarray | None:
    """Device hours after each step, of however many ranks it ran on; None where a line does not say."""
    if not all(_has(line, "ranks") for line in lines):
        return None
    return np.cumsum([line["step_ms"] * line["ranks"] for line in lines]) / MS_PER_HOUR


def _sign(metric: str, better: str | None) -> float:
    """1 where lower is better, -1 where higher is."""
    last = "accuracy" if metric.startswith(PREFIX) else metric.rsplit("/", 1)[-1]
    known = "lower" if last in LOWER_IS_BETTER else "higher" if last in HIGHER_IS_BETTER else None
    if better is None and known is None:
        raise UserError(f"--metric {metric}: say with --better whether lower or higher is better")
    return 1.0 if (better or known) == "lower" else -1.0


def _series(lines: list[dict[str, Any]], metric: str, run: str) -> list[tuple[int, float | None, float]]:
    """(tokens, device hours, value) of the steps that have the metric."""
    hours = device_hours(lines)
    found = [
        (x["tokens"], None if hours is None else float(hours[i]), float(x[metric]))
        for i, x in enumerate(lines)
        if _has(x, metric)
    ]
    if not found:
        known = sorted({key for line in lines for key in line if key.startswith(("eval/", PREFIX))})
        raise UserError(f"{run}: no step has '{metric}'; evaluations in its metrics: {', '.join(known) or 'none'}")
    return found


def _has(line: dict[str, Any], key: str) -> bool:
    value = line.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _reached(
    series: list[tuple[int, float | None, float]], goal: float, sign: float
) -> tuple[int, float | None] | None:
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
    """Each run once: the folders' last names, or whole paths where two share one."""
    found = {run.resolve(): run for run in reversed(runs)}
    folders = [path for path in dict.fromkeys(run.resolve() for run in runs)]
    short = [path.name for path in folders]
    names = short if len(set(short)) == len(short) else [str(found[path]) for path in folders]
    return dict(zip(folders, names, strict=True))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
