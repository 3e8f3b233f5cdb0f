"""Choosing and permuting tokens, with the same result however samples are cut over ranks."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.context_parallel import gather_samples, local_part

MILLIONTHS = 1_000_000
"""A share is a whole number of millionths, so that the count kept is integer arithmetic."""


@torch.no_grad()
def top_share(
    score: Tensor,
    mask: Tensor,
    share: float,
    *,
    scope: Literal["sequence", "microbatch"] = "sequence",
    positions: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """1 at the ceil(share * n) unmasked tokens with the highest score of each group of n unmasked tokens, 0 elsewhere.

    Args:
        score, mask: [b, s]; s is this rank's part under context parallelism. Masked scores may hold anything.
        share: in (0, 1], rounded to millionths.
        scope: a group is a whole sample ("sequence"), or all samples of the call ("microbatch").
        positions: [s] int64, place of each token in its whole sample. None: 0..s-1.
        cp_group: ranks that hold the other parts of the same samples. One all-gather of [2 b + 1, s] float64.

    Returns:
        [b, s] float32. Of equal scores the one earlier in the sample wins, then the earlier sample. An unmasked score
        that is not finite makes its whole group NaN, masked tokens excepted, rather than quietly winning or losing.
    """
    kept = mask > 0
    gathered, whole_mask = gather_samples([torch.where(kept, score.double(), 0.0), kept], positions, cp_group)
    whole_kept = whole_mask > 0
    groups = torch.where(whole_kept, gathered, -torch.inf)
    if scope == "microbatch":
        groups = groups.t().reshape(1, -1)  # position first, so that it breaks ties first
    count = (groups > -torch.inf).sum(dim=1, keepdim=True)
    order = groups.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    chosen = (rank < num_selected(count, share)).double()
    if scope == "microbatch":
        chosen = chosen.view(whole_kept.shape[::-1]).t()
    unusable = whole_kept & ~gathered.isfinite()
    unusable = unusable.any(dim=1, keepdim=True) if scope == "sequence" else unusable.any()
    chosen = chosen.masked_fill(unusable, torch.nan).where(whole_kept, 0.0)
    return local_part(chosen, positions).float()


def num_selected(count: Tensor, share: float) -> Tensor:
    """ceil(share * count), int64, without floating point."""
    return (count * round(share * MILLIONTHS) + MILLIONTHS - 1) // MILLIONTHS


@torch.no_grad()
def shuffle_in_samples(
    values: Tensor,
    mask: Tensor,
    *,
    seed: int,
    step: int,
    sample_id: Tensor,
    positions: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The values of each sample's unmasked tokens, randomly permuted among these tokens; 0 at masked ones.

    The permutation follows from (seed, step, sample_id) alone, on any device and in any layout.

    Args:
        values, mask: [b, s] float32; s is this rank's part under context parallelism.
        sample_id: [b] int64. positions, cp_group: as in `top_share`.

    Returns: [b, s] float32.
    """
    whole, whole_mask = gather_samples([values, mask], positions, cp_group)
    kept = whole_mask > 0
    place = torch.arange(whole.shape[1], device=whole.device).expand_as(kept)
    draw = random_draws(seed, step, sample_id, place[0])
    last = torch.iinfo(torch.int64).max
    source = place.masked_fill(~kept, last).argsort(dim=1, stable=True)
    target = draw.masked_fill(~kept, last).argsort(dim=1, stable=True)
    shuffled = torch.zeros_like(whole).scatter_(1, target, whole.gather(1, source)).where(kept, 0.0)
    return local_part(shuffled, positions).float()


def random_draws(seed: int, step: int, sample_id: Tensor, positions: Tensor) -> Tensor:
    """A random number for each token: [b, s] int64 below 2^62, from sample_id [b], positions [s], seed and step alone,
    on any device and in any layout."""
    state = _mix(torch.full_like(sample_id, seed))
    for part in (torch.full_like(sample_id, step), sample_id):
        state = _mix(state ^ _mix(part))
    return _mix(state[:, None] ^ _mix(positions)[None]) >> 1


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of int64 in which every input bit moves every output bit."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@torch.no_grad()
def top_share_of_all(
    scores: list[Tensor],
    masks: list[Tensor],
    share: float,
    *,
    sample_ids: list[Tensor],
    positions: Tensor,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """1 at the ceil(share * n) highest scores among all n unmasked tokens of all microbatches and ranks, 0 elsewhere.

    An exact radix selection: nothing is gathered, and equal scores are told apart by a hash of sample and position, so
    that the result is the same in every layout.

    Args:
        scores, masks: [b, s] of each microbatch on this rank. Masked scores may hold anything.
        share: as in `top_share`.
        sample_ids: [b] int64 of each microbatch.
        positions: [s] int64, place of each token in its whole sample.
        group: ranks that hold the rest of the batch. Nine all-reduces, the largest of 65,536 int64.

    Returns:
        [b, s] float32 of each microbatch; NaN at all unmasked tokens where any unmasked score is not finite.
    """
    kept = torch.cat([mask.flatten() > 0 for mask in masks])
    score = torch.cat([one.flatten() for one in scores]).double().where(kept, 0.0) + 0.0  # -0 counts as 0
    tokens = [_mix(_mix(ids)[:, None] ^ _mix(positions)[None]).flatten() for ids in sample_ids]
    totals = torch.stack([kept.sum(), (~score.isfinite()).sum()])
    sum_over(totals, group)
    count, unusable = totals.unbind()

    bits = score.view(torch.int64)
    key = bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)  # ordered as the scores are
    threshold, above = _kth_largest(key, kept, num_selected(count, share), group)
    tied = kept & (key == threshold)
    draw = torch.cat(tokens)
    last, _ = _kth_largest(draw, tied, num_selected(count, share) - above, group)
    chosen = (kept & (key > threshold)) | (tied & (draw >= last))
    result = chosen.float().masked_fill(unusable > 0, torch.nan).where(kept, 0.0)
    parts = result.split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


DIGIT_BITS = 16


def _kth_largest(key: Tensor, candidates: Tensor, k: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(the k-th largest key among the candidates of all ranks, how many are larger). key [n] int64, k int64 scalar."""
    unsigned = key ^ torch.iinfo(torch.int64).min
    found = above = torch.zeros_like(k)
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        digit = _shift(unsigned, shift) & ((1 << DIGIT_BITS) - 1) if shift else unsigned & ((1 << DIGIT_BITS) - 1)
        histogram = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=key.device)
        histogram.scatter_add_(0, digit, candidates.long())
        sum_over(histogram, group)
        larger = histogram.flip(0).cumsum(0).flip(0) - histogram  # candidates with a larger digit
        chosen = ((larger < k - above) & (histogram > 0)).long().argmax()  # the lowest such digit comes first
        candidates = candidates & (digit == chosen)
        above = above + larger[chosen]
        found = (found << DIGIT_BITS) | chosen
    return found ^ torch.iinfo(torch.int64).min, above


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """x summed over the group's ranks, in place."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
