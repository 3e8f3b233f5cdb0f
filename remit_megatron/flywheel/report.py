"""`remit flywheel report`: one page with the figures of every stage that has any, finished or not."""

import html
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from remit_megatron.analysis.plots import COLOURS
from remit_megatron.data.files import write_atomically
from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.graph import BENCHMARK, MID, Node, Plan
from remit_megatron.flywheel.state import assess, metrics
from remit_megatron.posttrain.contract import read_manifest

ORDER = ("base", MID, "sft", "dpo", "rl")
SMOOTHED = 60
"""Lines of metrics; curves with more are running means."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .8em .2em 0;text-align:left}"
    "th{border-bottom:1px solid #999}figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}"
    ".figure td{text-align:right}"
)


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with a line a stage."""

    kind: str
    title: str
    keys: tuple[str, ...]
    """The first of these that a line of metrics has."""
    label: str
    x: str = "step"


PANELS = (
    Panel("sft", "SFT: training loss", ("loss",), "nats a token"),
    Panel("dpo", "DPO: training loss", ("loss",), "loss"),
    Panel("dpo", "DPO: chosen above rejected", ("accuracy", "rewards/accuracies"), "share of pairs"),
    Panel("rl", "RL: verifiable correct rate", ("correct", "reward"), "share of completions"),
    Panel("rl", "RL: response length", ("response_tokens", "completions/mean_length"), "tokens"),
    Panel("rl", "RL: KL to the model before it", ("kl",), "nats a token"),
    Panel(MID, "Mid-training: NLL", ("nll",), "nats a token", "tokens"),
    Panel(MID, "Mid-training: gap to the reference", ("gap_mean",), "nats a token", "tokens"),
    Panel(MID, "Mid-training: KL to the reference", ("kl",), "nats a token", "tokens"),
)


def write_report(plan: Plan, contents: Contents, path: Path) -> Path:
    """Write the page; returns its path. Raises RunError where it cannot be written."""
    write_atomically(path, page(plan, contents).encode())
    return path


def page(plan: Plan, contents: Contents) -> str:
    """HTML with the figures as SVG inside."""
    title = html.escape(f"Flywheel {plan.wheel.folder.name}")
    scores = accuracies(plan)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        _stages(plan, contents),
        *(["<h2>Accuracy after each stage</h2>", *_accuracy_tables(scores), *_accuracy_figures(scores)] * bool(scores)),
        "<h2>Training</h2>",
        *filter(None, (_panel(panel, plan) for panel in PANELS)),
        *_divergences(plan),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def accuracies(plan: Plan) -> dict[str, dict[str, dict[str, float]]]:
    """Benchmark and figure -> round and arm -> stage -> value, of the benchmarks that are done."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for node in plan.nodes:
        manifest = read_manifest(node.folder) if node.kind == BENCHMARK else None
        if manifest is None or "reference" in node.parents:
            continue
        for name in node.names:
            prefix, _, label = name.rpartition("-")
            run, _, stage = prefix.rpartition("-")
            for figure, value in manifest.last.items():
                key = label if len(manifest.last) == 1 else f"{label}: {figure}"
                found.setdefault(key, {}).setdefault(run or "base", {})[stage or "base"] = value
    return found


def _stages(plan: Plan, contents: Contents) -> str:
    states = assess(plan, contents)
    rows = []
    for node in plan.nodes:
        manifest = read_manifest(node.folder)
        state = states[node.folder]
        seconds = "" if manifest is None else f"{manifest.seconds:,.0f} s"
        identity = "" if manifest is None else manifest.identity
        made_from = ", ".join(source.name for source in node.parents.values())
        rows.append([", ".join(node.names), state.word, made_from, seconds, identity, state.why])
    return _table(["stage", "state", "from", "time", "identity", ""], rows)


def _accuracy_tables(scores: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    tables = []
    for title, runs in scores.items():
        stages = [stage for stage in ORDER if any(stage in values for values in runs.values())]
        rows = [[run, *(f"{v[s]:.4g}" if s in v else "" for s in stages)] for run, v in runs.items()]
        tables.append(f"<h3>{html.escape(title)}</h3>" + _table(["", *stages], rows, "figure"))
    return tables


def _accuracy_figures(scores: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line a round and arm, from the base over the stages."""
    figures = []
    for title, runs in scores.items():
        stages = [stage for stage in ORDER if any(stage in values for values in runs.values())]
        base = runs.get("base", {})
        figure, axis = _figure(title, "after the stage", "")
        lines = {run: values for run, values in runs.items() if run != "base"} or runs
        for colour, (run, own) in zip(COLOURS * len(lines), lines.items(), strict=False):
            values = {**base, **own}
            x = [i for i, stage in enumerate(stages) if stage in values]
            y = [values[stages[i]] for i in x]
            axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.5, label=run)
        axis.set_xticks(range(len(stages)), stages)
        figures.append(_svg(figure, axis))
    return figures


def _panel(panel: Panel, plan: Plan) -> str:
    """A figure, or nothing where no stage has such a number."""
    lines = {}
    for node in plan.nodes:
        if node.kind == panel.kind:
            x, y = _series(node, panel)
            if len(x):
                lines[node.name] = (x, y)
    if not lines:
        return ""
    figure, axis = _figure(panel.title, panel.x, panel.label)
    for colour, (name, (x, y)) in zip(COLOURS * len(lines), lines.items(), strict=False):
        if len(x) > SMOOTHED:
            axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        marker = "o" if len(x) < 20 else None
        axis.plot(x, _smooth(y), color=colour, label=name, linewidth=1.5, marker=marker, markersize=3)
    return _svg(figure, axis)


def _divergences(plan: Plan) -> list[str]:
    """A figure for each model that others' KL is taken to: its quantiles over tokens, a line a model."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for node in plan.nodes:
        manifest = read_manifest(node.folder) if node.kind == BENCHMARK and "reference" in node.parents else None
        if manifest is not None:
            found.setdefault(node.parents["reference"].name, {})[node.parents["model"].name] = manifest.last
    figures = []
    for reference, models in found.items():
        figure, axis = _figure(f"KL to {reference}, over tokens", "share of tokens below", "nats")
        for colour, (name, figures_of) in zip(COLOURS * len(models), models.items(), strict=False):
            points = sorted((float(key), value) for key, value in figures_of.items() if key != "mean")
            label = f"{name} (mean {figures_of['mean']:.3g})"
            axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.5, marker="o", markersize=3)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.yaxis.set_major_formatter("{x:g}")
        figures.append(_svg(figure, axis))
    return figures


def _series(node: Node, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    pairs = []
    for line in metrics(node):
        value = next((line[key] for key in panel.keys if isinstance(line.get(key), int | float)), None)
        if value is not None and panel.x in line:
            pairs.append((line[panel.x], value))
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of many values; the window shrinks at both ends."""
    half = len(values) // 40 if len(values) > SMOOTHED else 0
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    smooth: np.ndarray = (total[high] - total[low]) / (high - low)
    return smooth


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, 3.5), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    axis.set_title(title, fontsize=11, loc="left", parse_math=False)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Figure, axis: Any) -> str:
    axis.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "remit"}):  # text as text; the same page again
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _table(head: list[str], rows: Iterable[list[str]], kind: str = "stages") -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table class='{kind}'>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
