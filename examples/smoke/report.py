"""Table, results.json and plot of the smoke run, from the run folders' metrics and evaluations."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from remit_megatron.analysis.runs import WARM_UP_STEPS, read_metrics

COLOURS = {"ntp": "#4c72b0", "remit": "#c44e52"}
LABELS = {"base": "base", "reference": "reference", "ntp": "NTP", "remit": "ReMiT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is reported of one run. NLL in nats a token, times in milliseconds; None: not measured."""

    run: str
    tokens: int
    """Trained in this run, its start not counted."""
    nll_code: float | None
    nll_arithmetic: float | None
    correct: int | None
    problems: int | None
    step_ms: float
    """Median step."""
    score_ms: float | None
    """Median time of the reference's pass inside a step."""

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.problems if self.correct is not None and self.problems else None

    @property
    def reference_share(self) -> float | None:
        """The reference's part of a step's time."""
        return None if self.score_ms is None else self.score_ms / self.step_ms


def read_row(name: str, run: Path, evaluation: dict[str, Any]) -> Row:
    """One row from a run's metrics and what `remit eval` wrote of its last checkpoint."""
    lines = read_metrics(run)
    timed = lines[WARM_UP_STEPS:] or lines
    score = [line["score_ms"] for line in timed if "score_ms" in line]
    return Row(
        run=name,
        tokens=lines[-1]["tokens"],
        nll_code=evaluation.get("eval/code/nll"),
        nll_arithmetic=evaluation.get("eval/arithmetic/nll"),
        correct=evaluation.get("correct"),
        problems=evaluation.get("problems"),
        step_ms=statistics.median(line["step_ms"] for line in timed),
        score_ms=statistics.median(score) if score else None,
    )


def table(rows: list[Row]) -> str:
    """Aligned text, one line a run."""
    head = ("run", "tokens", "NLL code", "NLL arithmetic", "exact match", "step ms", "reference share")
    cells = [
        (
            LABELS.get(row.run, row.run),
            f"{row.tokens:,}",
            _number(row.nll_code, ".4f"),
            _number(row.nll_arithmetic, ".4f"),
            "-" if row.accuracy is None else f"{row.accuracy:.1%} ({row.correct}/{row.problems})",
            _number(row.step_ms, ".0f"),
            _number(row.reference_share, ".1%"),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]

    def aligned(line: tuple[str, ...]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )

    return "\n".join([aligned(head), "  ".join("-" * width for width in widths), *map(aligned, cells)])


def write_report(out: Path, runs: dict[str, Path], evaluations: dict[str, dict[str, Any]]) -> str:
    """Write results.json and mid_training.png into `out` and return the table with the path of the plot.

    `runs` maps base, reference, ntp and remit to run folders, `evaluations` the same names to what `remit eval` wrote.
    """
    rows = [read_row(name, run, evaluations[name]) for name, run in runs.items()]
    by_name = {row.run: row for row in rows}
    ratio = by_name["remit"].step_ms / by_name["ntp"].step_ms
    results = {
        "runs": [asdict(row) | {"accuracy": row.accuracy, "reference_share": row.reference_share} for row in rows],
        "step_ms_remit_over_ntp": ratio,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure = out / "mid_training.png"
    plot(figure, {name: read_metrics(runs[name]) for name in ("ntp", "remit")})
    return "\n".join(
        [
            table(rows),
            "",
            "NLL: nats a token on held-out text. Exact match: boxed answer, greedy decoding, held-out problems.",
            "tokens: trained in that run; reference, NTP and ReMiT start from base. step ms: median.",
            f"step time ReMiT / NTP: {ratio:.2f}",
            f"results: {out / 'results.json'}",
            f"plot: {figure}",
        ]
    )


def plot(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One PNG of six panels over tokens: loss and NLL, held-out NLL (two), gap, weights, clipped shares."""
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for name, lines in runs.items():
        colour, label = COLOURS[name], LABELS[name]
        _curve(axes[0], lines, "nll", colour, f"{label}: NLL")
        if any("weight_mean" in line for line in lines):  # without weights the loss is the NLL
            _curve(axes[0], lines, "loss", colour, f"{label}: loss (weighted NLL)", style=":")
        _points(axes[1], lines, "eval/arithmetic/nll", colour, label)
        _points(axes[2], lines, "eval/code/nll", colour, label)
        _curve(axes[3], lines, "gap_mean", colour, f"{label}: student - reference")
        _weights(axes[4], lines, colour, label)
        _curve(axes[5], lines, "clipped_low", colour, f"{label}: at 1 - epsilon", scale=100)
        _curve(axes[5], lines, "clipped_high", "#dd8452", f"{label}: at 1 + epsilon", scale=100)
    titles = (
        ("Training loss and NLL", "nats / token"),
        ("Held-out arithmetic", "NLL (nats / token)"),
        ("Held-out code", "NLL (nats / token)"),
        ("Mean gap to the reference", "gap (nats / token)"),
        ("Token weights", "weight: mean, one standard deviation"),
        ("Clipped weights", "share of tokens (%)"),
    )
    for axis, (title, label) in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("mid-training tokens (thousands)")
        axis.set_ylabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=130)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(thousands of tokens, values) of the lines that have a value."""
    pairs = [(line["tokens"] / 1e3, line[key]) for line in lines if line.get(key) is not None]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the run; the window shrinks at both ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _curve(
    axis: Any, lines: list[dict[str, Any]], key: str, colour: str, label: str, scale: float = 1.0, style: str = "-"
) -> None:
    """Running mean: single steps differ mostly by how much code and arithmetic they hold."""
    x, y = _series(lines, key)
    if len(x):
        axis.plot(x, _smooth(y) * scale, style, color=colour, linewidth=1.6, label=label)


def _points(axis: Any, lines: list[dict[str, Any]], key: str, colour: str, label: str) -> None:
    x, y = _series(lines, key)
    if len(x):
        axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.4, label=label)


def _weights(axis: Any, lines: list[dict[str, Any]], colour: str, label: str) -> None:
    x, mean = _series(lines, "weight_mean")
    _, std = _series(lines, "weight_std")
    if len(x) and len(x) == len(std):
        centre, spread = _smooth(mean), _smooth(std)
        axis.fill_between(x, centre - spread, centre + spread, color=colour, alpha=0.18, linewidth=0)
        axis.plot(x, centre, color=colour, linewidth=1.7, label=label)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
