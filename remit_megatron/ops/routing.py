"""Which tokens learn from the reference's distribution, chosen by what the reference alone says of them.

The student has no part in it, so that an exact threshold over a step's whole batch costs no pass of a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.choices import Routing
from remit_megatron.ops.selection import random_draws, sum_over, top_share, top_share_of_all

PROBED_ONE_IN = 16
"""Of the tokens that are not routed, how many are compared all the same, so that their KL is known."""
_PROBE_SEED = 20260902


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What became of one microbatch's tokens, [b, s] each; s is this rank's part under context parallelism."""

    chosen: Tensor
    """float32: 1 where the token is routed to the reference, 0 elsewhere and where masked; NaN where a score that was
    not finite made the choice fail."""
    balance: Tensor
    """float32: unmasked tokens of the global batch over those of the token's own group, 0 where masked."""
    compared: Tensor
    """bool: routed, or one of the few others whose comparison is looked at."""
    threshold: Tensor
    """float32: the entropy at the border between the groups where the token competes, nats; not finite where there is
    none."""


@torch.no_grad()
def route(
    routing: Routing,
    entropies: Sequence[Tensor],
    agrees: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    sample_ids: Sequence[Tensor],
    positions: Tensor,
    step: int,
    cp_group: dist.ProcessGroup | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Routed]:
    """Routes the tokens of a step's microbatches.

    Args:
        entropies, agrees, masks: [b, s] of each microbatch on this rank: the reference's entropy in nats, whether its
            most probable token is the label, and 1 where the token is trained on. Masked entries may hold anything.
        sample_ids: [b] int64 of each microbatch.
        positions: [s] int64, place of each token in its whole sample.
        step: number of the optimizer step, for random choices.
        cp_group: ranks that hold the other parts of the same samples. group: ranks that hold the rest of the batch,
            those of cp_group among them.

    Of equal scores the one with the higher hash of sample and position wins in scope "global", elsewhere the one that
    comes first. Collectives over `group`: those of `top_share_of_all` in scope "global", then one sum of two integers
    and one maximum; over `cp_group`, in the other scopes, two a microbatch.
    """
    kept = [mask > 0 for mask in masks]
    draws = [random_draws(routing.seed, step, ids, positions) for ids in sample_ids]
    scores = {
        "low_entropy": [-entropy.double() for entropy in entropies],
        "high_entropy": [entropy.double() for entropy in entropies],
        "random": [draw.double() for draw in draws],
        "correct": [agree.double() for agree in agrees],
    }[routing.by]
    chosen = _chosen(routing, scores, masks, sample_ids, positions, cp_group, group)
    thresholds = _thresholds(routing, scores, chosen, cp_group, group)

    totals = torch.stack([torch.stack([one.sum() for one in kept]), torch.stack([(one != 0).sum() for one in chosen])])
    totals = totals.sum(dim=1)
    sum_over(totals, group)
    count, routed = totals.double()
    shares = [torch.where(one != 0, routed, count - routed).clamp(min=1.0) for one in chosen]
    probes = [random_draws(_PROBE_SEED, 0, ids, positions) % PROBED_ONE_IN == 0 for ids in sample_ids]
    return [
        Routed(
            chosen=one,
            balance=(count / share).where(mask, 0.0).float(),
            compared=mask & ((one != 0) | probe),
            threshold=threshold.expand_as(one).float(),
        )
        for one, share, mask, probe, threshold in zip(chosen, shares, kept, probes, thresholds, strict=True)
    ]


def _chosen(
    routing: Routing,
    scores: list[Tensor],
    masks: Sequence[Tensor],
    sample_ids: Sequence[Tensor],
    positions: Tensor,
    cp_group: dist.ProcessGroup | None,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """[b, s] float32 of each microbatch."""
    if routing.by == "correct":
        return [score.where(mask > 0, 0.0).float() for score, mask in zip(scores, masks, strict=True)]
    if routing.share == 0.0:
        return [torch.zeros_like(mask, dtype=torch.float32) for mask in masks]
    if routing.scope == "global":
        return top_share_of_all(
            scores, list(masks), routing.share, sample_ids=list(sample_ids), positions=positions, group=group
        )
    return [
        top_share(score, mask, routing.share, scope=routing.scope, positions=positions, cp_group=cp_group)
        for score, mask in zip(scores, masks, strict=True)
    ]


def _thresholds(
    routing: Routing,
    scores: list[Tensor],
    chosen: list[Tensor],
    cp_group: dist.ProcessGroup | None,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """The entropy of the token that was chosen last where each token competes, to be broadcast to [b, s]."""
    if routing.by not in ("low_entropy", "high_entropy"):
        return [torch.full_like(one, torch.nan) for one in chosen]
    sign = 1.0 if routing.by == "high_entropy" else -1.0
    falling = [torch.where(one != 0, -score, -torch.inf) for score, one in zip(scores, chosen, strict=True)]
    if routing.scope == "global":
        highest = torch.stack([one.amax() for one in falling]).amax()[None, None]
        _largest_over(highest, group)
        return [-sign * highest] * len(scores)
    thresholds = []
    for one in falling:
        found = one.amax(dim=1, keepdim=True) if routing.scope == "sequence" else one.amax()[None, None]
        _largest_over(found, cp_group)
        thresholds.append(-sign * found)
    return thresholds


def _largest_over(x: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
