"""Figures of a comparison: margins, KL and weights of tokens, and which tokens the reference is surer of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from remit_megatron.analysis.comparison import Comparison

NEGLIGIBLE_NATS = 0.1
"""Margins below it count as none, as in the paper's Figure 11."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHARES = (0.01, 0.05, 0.1)
"""Of the tokens, those with the largest margins: what part of all that the reference is surer by is theirs."""
MIN_COUNT = 5
TOP_TOKENS = 40


def summarise(comparison: Comparison, text_of: Callable[[int], str] | None = None) -> dict[str, Any]:
    """Figures of every model against the reference, over unmasked tokens, for summary.json.

    text_of: an id's text. Margins, NLL and KL are in nats.
    """
    mask = comparison.mask
    result: dict[str, Any] = {
        "set": comparison.set_name,
        "samples": len(mask),
        "tokens": int(mask.sum()),
        "sources": comparison.sources,
        "reference_nll": _mean(comparison.reference_nll[mask]),
        "models": {},
    }
    for name, model in comparison.models.items():
        margin = comparison.margin(name)[mask].astype(np.float64)
        weight = model.weight[mask].astype(np.float64)
        result["models"][name] = {
            "nll": _mean(model.nll[mask]),
            "margin": {"mean": _mean(margin), "quantiles": _quantiles(margin)},
            "share_reference_surer": float((margin >= NEGLIGIBLE_NATS).mean()),
            "share_model_surer": float((margin <= -NEGLIGIBLE_NATS).mean()),
            "concentration": concentration(margin),
            "kl": {"mean": _mean(model.kl[mask]), "quantiles": _quantiles(model.kl[mask])},
            "weight": {"mean": _mean(weight), "std": float(weight.std()), "quantiles": _quantiles(weight)},
            "tokens_the_reference_is_surer_of": by_token(comparison, name, text_of),
        }
    return result


def concentration(margin: np.ndarray) -> dict[str, float] | None:
    """Part of the sum of positive margins that lies with the 1, 5 and 10% of tokens of the largest margins.

    1 says that the reference's advantage is all there; an even advantage gives the share itself. None where no margin
    is positive.
    """
    ordered = np.sort(np.maximum(margin, 0.0))[::-1]
    total = ordered.sum()
    if not total > 0:
        return None
    return {f"{share:g}": float(ordered[: max(1, round(share * len(ordered)))].sum() / total) for share in SHARES}


def by_token(comparison: Comparison, name: str, text_of: Callable[[int], str] | None) -> list[dict[str, Any]]:
    """The ids with the largest mean margin, of those that occur MIN_COUNT times: largest first."""
    mask = comparison.mask
    ids, margin = comparison.tokens[mask], comparison.margin(name)[mask].astype(np.float64)
    found, place = np.unique(ids, return_inverse=True)
    counts = np.bincount(place)
    means = np.bincount(place, weights=margin) / counts
    kept = np.flatnonzero(counts >= MIN_COUNT)
    order = kept[np.argsort(-means[kept], kind="stable")][:TOP_TOKENS]
    return [
        {"token": int(found[i]), "count": int(counts[i]), "mean_margin": float(means[i])}
        | ({"text": text_of(int(found[i]))} if text_of else {})
        for i in order
    ]


def token_table(comparison: Comparison) -> pa.Table:
    """A row a token: sample, position, token, mask, nll/reference, and nll/, kl/ and weight/ of every model."""
    count, length = comparison.tokens.shape
    columns: dict[str, Any] = {
        "sample": np.repeat(np.arange(count, dtype=np.int32), length),
        "position": np.tile(np.arange(length, dtype=np.int32), count),
        "token": comparison.tokens.ravel(),
        "mask": comparison.mask.ravel(),
        "nll/reference": comparison.reference_nll.ravel(),
    }
    for name, model in comparison.models.items():
        for what in ("nll", "kl", "weight"):
            columns[f"{what}/{name}"] = getattr(model, what).ravel()
    return pa.table(columns)


def _mean(values: np.ndarray) -> float:
    return float(values.astype(np.float64).mean())


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), QUANTILES)
    return {f"{q:g}": float(x) for q, x in zip(QUANTILES, found, strict=True)}
