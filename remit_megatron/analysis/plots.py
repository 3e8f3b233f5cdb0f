"""Pictures of the analyses."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from remit_megatron.analysis.comparison import Comparison

COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#dd8452", "#937860", "#da8bc3", "#8c8c8c")
BINS = 80


def plot_comparison(comparison: Comparison) -> bytes:
    """A PNG: log-probabilities of the tokens (Figure 2), margins, and KL from the reference (Figure 6b)."""
    figure, axes = _figure(3)
    mask = comparison.mask
    log_p = {"reference": -comparison.reference_nll[mask]}
    log_p |= {name: -model.nll[mask] for name, model in comparison.models.items()}
    margins = {name: comparison.margin(name)[mask] for name in comparison.models}
    divergences = {name: model.kl[mask] for name, model in comparison.models.items()}
    _histogram(axes[0], log_p, "Log-probability of the tokens", "log p (nats)")
    _histogram(axes[1], margins, "Margin of the reference", "log p reference - log p model (nats)")
    _histogram(axes[2], divergences, "KL from the reference", "KL(reference || model) (nats)")
    return _png(figure)


def plot_curves(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], labels: Any) -> bytes:
    """A PNG with a panel a title: for each run a line (x, y). labels: title -> (x label, y label)."""
    figure, axes = _figure(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for colour, (name, (x, y)) in zip(COLOURS * len(lines), lines.items(), strict=False):
            marker = "o" if len(x) < 40 else None
            axis.plot(x, y, color=colour, label=_label(name), linewidth=1.5, marker=marker, markersize=3.5)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(labels[title][0])
        axis.set_ylabel(labels[title][1])
        if lines:
            axis.legend(frameon=False, fontsize=8.5)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _label(name: str) -> str:
    """A name as it is: matplotlib hides a label that begins with _, and sets what stands between $ as mathematics."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _figure(panels: int) -> tuple[Figure, Any]:
    """Panels side by side, at most four in a row."""
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    every = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for spare in every[panels:]:
        spare.remove()
    axes = every[:panels]
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _histogram(axis: Any, values: dict[str, np.ndarray], title: str, label: str) -> None:
    """Densities over one range, which leaves out the outermost thousandth at each side, on a logarithmic scale."""
    every = np.concatenate(list(values.values()))
    low, high = np.quantile(every, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    models = [name for name in values if name != "reference"]
    for name, one in values.items():
        colour = COLOURS[models.index(name) % len(COLOURS)] if name in models else "#222222"
        density, _ = np.histogram(one, bins=edges, density=True)
        axis.stairs(density, edges, color=colour, label=f"{_label(name)} (mean {one.mean():.3f})", linewidth=1.3)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(label)
    axis.set_ylabel("density")
    axis.legend(frameon=False, fontsize=8.5)
