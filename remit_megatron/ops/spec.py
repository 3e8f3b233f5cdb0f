"""Float64 definitions of every quantity in the loss path, unsharded and in one piece.

This file is the specification: every implementation is tested against it, and it imports none of them.
"""

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100


def token_nll(logits: Tensor, labels: Tensor, *, valid_vocab: int | None = None) -> Tensor:
    """-log p(label), nats. logits [..., V], labels [...] -> float64 [...]; an ignored label gives 0.

    Columns from `valid_vocab` on are padding and take no part in the softmax. Differentiable by autograd.
    """
    log_p = logits.double()[..., :valid_vocab].log_softmax(dim=-1)
    ignored = labels == IGNORED_LABEL
    column = labels.masked_fill(ignored, 0)
    return -log_p.gather(-1, column[..., None]).squeeze(-1).masked_fill(ignored, 0.0)


def remit_weights(
    nll: Tensor,
    ref_nll: Tensor,
    mask: Tensor,
    *,
    segment_ids: Tensor | None = None,
    centering: Literal["sample", "document"] = "sample",
    epsilon: float = 0.2,
    clip: bool = True,
) -> Tensor:
    """Equations 3 to 5. All arguments [b, s] of whole samples -> float64 weights [b, s], 0 where the mask is 0.

    The centring group is a row ("sample") or the positions of a row that share a segment id ("document").
    """
    weights = torch.zeros(nll.shape, dtype=torch.float64)
    for row in range(nll.shape[0]):
        segments = [0] * nll.shape[1]
        if centering == "document":
            assert segment_ids is not None
            segments = segment_ids[row].tolist()
        for segment in set(segments):
            kept = [t for t in range(nll.shape[1]) if segments[t] == segment and mask[row, t] > 0]
            if not kept:
                continue
            gap = nll[row, kept].detach().double() - ref_nll[row, kept].detach().double()
            weight = 2.0 * torch.sigmoid(gap - gap.mean())
            weights[row, kept] = weight.clamp(1.0 - epsilon, 1.0 + epsilon) if clip else weight
    return weights


def forward_kl(
    logits: Tensor, reference_logits: Tensor, *, valid_vocab: int | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(reference || student) over the valid columns, nats. Both logits [..., V] -> float64 [...]."""
    log_p, log_q = (x.double()[..., :valid_vocab].div(temperature).log_softmax(-1) for x in (logits, reference_logits))
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def top_share(score: Tensor, mask: Tensor, share: str, scope: Literal["sequence", "microbatch"]) -> Tensor:
    """Float64 [b, s]: 1 at the ceil(share n) highest scores of each group of n unmasked tokens, 0 elsewhere.

    `share` is a decimal fraction as text. A group is a row, or everything. Ties go to the lower position, then row.
    """
    selected = torch.zeros(score.shape, dtype=torch.float64)
    tokens = [(-score[b, t].item(), t, b) for b in range(len(score)) for t in range(score.shape[1]) if mask[b, t] > 0]
    for group in [tokens] if scope == "microbatch" else [[x for x in tokens if x[2] == b] for b in range(len(score))]:
        for _, t, b in sorted(group)[: math.ceil(Fraction(share) * len(group))]:
            selected[b, t] = 1.0
    return selected


def loss(nll: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Equation 6: sum(m w nll) / sum(m), a float64 scalar. The denominator is the token count."""
    kept = mask > 0
    return (weights.double()[kept] * nll.double()[kept]).sum() / kept.sum()
