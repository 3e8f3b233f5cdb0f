"""Benchmarks of the checkpoints that runs kept, over the tokens each had seen: Figures 1, 12 and 15 of the paper."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.analysis.plots import plot_curves
from remit_megatron.benchmark import results
from remit_megatron.benchmark.suite import SUITES
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError
from remit_megatron.run.checkpoint import identity

PREFIX = "benchmark/"
AVERAGE = "average"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A checkpoint's results."""

    run: str
    """As the analysis names it."""
    step: int
    tokens: int
    suite: str
    figures: dict[str, float]
    """Percent, of each benchmark's first metric and `average`, where the suite is whole; in the suite's order."""
    remarks: int
    """Figures that are not comparable with others, by what `remit benchmark` says of them."""
    folder: str
    """With results.json."""


def find_points(folders: Sequence[Path], runs: Mapping[Path, str]) -> tuple[list[Point], list[str]]:
    """(points by suite, run and tokens, notes on results that are of none of the runs).

    runs: resolved folder -> name. Results belong to the run whose checkpoint of that step they are of, by content; of a
    checkpoint that is gone, by the run's folder. Raises UserError for a folder without results, for two results of one
    checkpoint, and for results of one suite that were made with different settings.
    """
    points: dict[tuple[str, str, int], Point] = {}
    settings: dict[str, tuple[Path, dict[str, Any]]] = {}
    others = []
    for path in _result_files(folders):
        content = results.read(path.parent)
        standing = content["model"].get("checkpoint")
        run = next((run for run in runs if standing and _is_of(standing, run)), None)
        if run is None:
            others.append(f"Left out, of none of these runs: {path.parent} ({content['model']['source']}).")
            continue
        point = _point(path.parent, content, standing, runs[run])
        _check_settings(settings, path.parent, content["settings"])
        key = (point.suite, point.run, point.step)
        if key in points:
            raise UserError(f"--results: {points[key].folder} and {path.parent} are of one checkpoint: leave one out")
        if point.figures:
            points[key] = point
    order = {name: number for number, name in enumerate(runs.values())}
    return sorted(points.values(), key=lambda point: (point.suite, order[point.run], point.tokens)), others


def _result_files(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in folders:
        files = sorted(folder.rglob(results.NAME))
        if not files:
            raise UserError(f"--results {folder}: no {results.NAME} of `remit benchmark` lies there or below")
        found.update(dict.fromkeys(path.resolve() for path in files))
    return list(found)


def _is_of(standing: Mapping[str, Any], run: Path) -> bool:
    checkpoint = run / "checkpoints" / f"step-{standing['step']:08d}"
    if (checkpoint / "meta.json").exists():
        return identity(checkpoint) == standing["identity"]
    return str(run) == standing["run"]


def _point(folder: Path, content: Mapping[str, Any], standing: Mapping[str, Any], run: str) -> Point:
    suite, tasks = SUITES[content["settings"]["suite"]], content["tasks"]
    done = [b for b in suite.benchmarks if tasks.get(b.name, {}).get("state") == results.DONE]
    average = results.average(suite, tasks)["percent"]
    figures = {} if average is None else {AVERAGE: average}
    figures |= {b.name: results.scores(b, tasks[b.name])[0] for b in done}
    return Point(
        run=run,
        step=standing["step"],
        tokens=standing["tokens"],
        suite=suite.name,
        figures=figures,
        remarks=sum(bool(tasks[b.name].get("remarks")) for b in done),
        folder=str(folder),
    )


def _check_settings(known: dict[str, tuple[Path, dict[str, Any]]], folder: Path, settings: dict[str, Any]) -> None:
    """Figures of one curve were made in one way."""
    first, theirs = known.setdefault(settings["suite"], (folder, settings))
    for key in sorted(theirs.keys() | settings.keys()):
        ours = settings.get(key, results.UNSAID.get(key))
        other = theirs.get(key, results.UNSAID.get(key))
        if other != ours:
            raise UserError(
                f"--results: {first} has {key} = {json.dumps(other)}, and {folder} {json.dumps(ours)}: figures of one "
                "curve are made with the same settings"
            )


def add_to_lines(points: Sequence[Point], lines: Mapping[str, list[dict[str, Any]]]) -> None:
    """Put the figures into the runs' lines, as metrics `benchmark/SUITE/NAME` of the checkpoint's step.

    Raises UserError where a run's metrics.jsonl has not that step, or other tokens at it.
    """
    for point in points:
        own = lines[point.run]
        if not 0 < point.step <= len(own) or own[point.step - 1]["tokens"] != point.tokens:
            raise UserError(
                f"{point.folder}: is of step {point.step} at {point.tokens:,} tokens, and the metrics.jsonl of "
                f"{point.run} has no such step: restore it"
            )
        own[point.step - 1].update({f"{PREFIX}{point.suite}/{name}": value for name, value in point.figures.items()})


def write_trajectories(points: Sequence[Point], output: Path) -> None:
    """Write trajectories.json and trajectories.png: a panel a benchmark, a line a run. Raises RunError."""
    suites = list(dict.fromkeys(point.suite for point in points))
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for suite in suites:
        of_suite = [point for point in points if point.suite == suite]
        for name in _names(of_suite):
            lines = {}
            for run in dict.fromkeys(point.run for point in of_suite):
                pairs = [(p.tokens, p.figures[name]) for p in of_suite if p.run == run and name in p.figures]
                if pairs:
                    lines[run] = np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])
            panels[f"{name} ({suite})" if len(suites) > 1 else name] = lines
    write_atomically(
        output / "trajectories.json", (json.dumps([asdict(point) for point in points], indent=1) + "\n").encode()
    )
    write_atomically(output / "trajectories.png", plot_curves(panels, dict.fromkeys(panels, ("tokens", "percent"))))


def trajectory_table(points: Sequence[Point]) -> str:
    """Markdown, a table a suite and a row a checkpoint; figures in percent, `*` where a row's have remarks."""
    parts = []
    for suite in dict.fromkeys(point.suite for point in points):
        of_suite = [point for point in points if point.suite == suite]
        names = _names(of_suite)
        rows = [["run", "tokens", *names], ["---", *["---:"] * (len(names) + 1)]]
        for point in of_suite:
            cells = [f"{point.figures[name]:.2f}" if name in point.figures else "-" for name in names]
            label = point.run.replace("|", r"\|") + ("*" if point.remarks else "")
            rows.append([label, f"{point.tokens:,}", *cells])
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    if any(point.remarks for point in points):
        parts.append("* with remarks of `remit benchmark`, which its results.json has")
    return "\n\n".join(parts)


def _names(points: Sequence[Point]) -> list[str]:
    """Of the figures that any of the points has, the average first, then in the suite's order."""
    known = [AVERAGE, *(b.name for b in SUITES[points[0].suite].benchmarks)]
    return [name for name in known if any(name in point.figures for point in points)]
