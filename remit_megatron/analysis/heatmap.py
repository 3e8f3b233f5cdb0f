"""Text with every token on the colour of its margin, as in the paper's Figures 3, 10 and 11: HTML without script."""

import html
from collections.abc import Sequence

import numpy as np

from remit_megatron.analysis.comparison import Comparison
from remit_megatron.analysis.margins import NEGLIGIBLE_NATS

FULL_COLOUR_NATS = 3.0
"""Margins from here on have the deepest colour."""
STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #111 }
html { background: #fff }
h1 { font-size: 1.3em } h2 { font-size: 1.05em; margin-top: 2em }
.text { font-family: ui-monospace, monospace; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 2px } .masked { color: #999 }
.key span { padding: 2px 10px }
"""


def page(comparison: Comparison, texts: Sequence[Sequence[str]]) -> str:
    """Every sample of `texts` under every model. texts: of the first samples, each label's text, in order."""
    parts = [
        f"<h1>How much surer the reference is of each token of {_escape(comparison.set_name)}</h1>",
        f"<p>Reference: {_escape(comparison.sources['reference'])}. {_key()}</p>",
    ]
    for name in comparison.models:
        margin = comparison.margin(name)
        for i, words in enumerate(texts):
            parts.append(f"<h2>{_escape(name)} ({_escape(comparison.sources[name])}), sample {i}</h2>")
            spans = [
                _span(word, float(margin[i, t]), _title(comparison, name, i, t), bool(comparison.mask[i, t]))
                for t, word in enumerate(words)
            ]
            parts.append(f'<div class="text">{"".join(spans)}</div>')
    body = "\n".join(parts)
    title = f"Margins on {_escape(comparison.set_name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def colour(margin_nats: float) -> str:
    """Red where the reference is surer, blue where the model is, white where it makes no difference."""
    if abs(margin_nats) < NEGLIGIBLE_NATS or not np.isfinite(margin_nats):
        return "#ffffff"
    depth = min(abs(margin_nats) / FULL_COLOUR_NATS, 1.0)
    fade = round(255 - 175 * depth)
    return f"#ff{fade:02x}{fade:02x}" if margin_nats > 0 else f"#{fade:02x}{fade:02x}ff"


def _span(word: str, margin: float, title: str, counts: bool) -> str:
    # A line break alone would show no colour.
    shown = _escape(word).replace("\n", "\u21b5\n") or "\u00b7"
    if not counts:
        return f'<span class="masked">{shown}</span>'
    return f'<span style="background:{colour(margin)}" title="{title}">{shown}</span>'


def _title(comparison: Comparison, name: str, i: int, t: int) -> str:
    model = comparison.models[name]
    return (
        f"margin {model.nll[i, t] - comparison.reference_nll[i, t]:+.3f}, nll {model.nll[i, t]:.3f}, reference "
        f"{comparison.reference_nll[i, t]:.3f}, kl {model.kl[i, t]:.3f}, weight {model.weight[i, t]:.3f}"
    )


def _key() -> str:
    steps = (-FULL_COLOUR_NATS, -1.0, 0.0, 1.0, FULL_COLOUR_NATS)
    spans = [f'<span style="background:{colour(x)}">{x:+g}</span>' for x in steps]
    return f'<span class="key">log p(reference) - log p(model), nats: {"".join(spans)}</span>'


def _escape(text: str) -> str:
    return html.escape(text)
