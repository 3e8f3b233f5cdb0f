"""ReMiT's token weights (Equations 3 to 5)."""

import torch
import torch.distributed as dist
from torch import Tensor

FIXED_POINT_PER_NAT = 2.0**24
"""Resolution of the centring sum. A sum of integers is exact, so the mean has the same bits for every order of
summation (atomics on a GPU included) and every cut over context-parallel ranks, at an error of 3e-8 nat."""
MAX_GAP_NATS = 2.0**17
"""Twice the range of float16 logits. With it the int64 sum cannot overflow below 2^22 tokens in a group."""


@torch.no_grad()
def remit_weights(
    nll: Tensor,
    ref_nll: Tensor,
    mask: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    epsilon: float = 0.2,
    clip: bool = True,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weights w = clip(2 sigmoid(gap - mean gap), 1 - epsilon, 1 + epsilon), with gap = nll - ref_nll.

    Args:
        nll: [b, s] the student's NLL, nats; s is this rank's part under context parallelism.
        ref_nll: [b, s] the frozen reference's NLL of the same labels, nats.
        mask: [b, s], 1 (or True) where the label is trained on, 0 elsewhere. None: everywhere.
        segment_ids: [b, s] int64 document number of each position, unique within the whole sample and below
            s * cp_size. Each document is then centred by itself. None: each row is one centring group.
        epsilon: half-width of the clip, in [0, 1].
        clip: False keeps 2 sigmoid(.), in (0, 2).
        cp_group: ranks that hold the other parts of the same samples. One all-reduce of [b, 3, groups] int64.

    Returns:
        [b, s] float32, 0 at masked positions, exactly 1 where the two NLLs are equal throughout. A constant for
        autograd. Masked entries of `nll` and `ref_nll` may hold anything; an unmasked gap that is not finite, or
        beyond 2^17 nats, makes its whole group NaN rather than quietly shifting the mean.
    """
    _check_shapes(nll, ref_nll, mask, segment_ids)
    assert 0.0 <= epsilon <= 1.0, f"epsilon must be in [0, 1], got {epsilon}"

    kept = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask > 0
    # Where, not a product: a masked position may hold inf or nan.
    gap = torch.where(kept, nll.double() - ref_nll.double(), 0.0)
    usable = gap.abs() < MAX_GAP_NATS  # False for nan, too
    fixed = torch.where(usable, gap * FIXED_POINT_PER_NAT, 0.0).round().long()
    parts = torch.stack([fixed, kept.long(), (~usable).long()], dim=1)  # [b, 3, s]

    if segment_ids is None:
        totals = parts.sum(dim=2, keepdim=True)  # [b, 3, 1]
        group_of_token = torch.zeros_like(fixed)
    else:
        cp_size = 1 if cp_group is None else dist.get_world_size(cp_group)
        num_groups = nll.shape[1] * cp_size  # an upper bound known without asking the device
        group_of_token = torch.where(kept, segment_ids, 0)
        totals = parts.new_zeros(nll.shape[0], 3, num_groups)
        totals.scatter_add_(2, group_of_token[:, None].expand_as(parts), parts)
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        dist.all_reduce(totals, group=cp_group)

    fixed_sum, count, unusable = totals.unbind(dim=1)  # [b, groups]
    mean = fixed_sum.double() / FIXED_POINT_PER_NAT / count.clamp(min=1)
    mean = torch.where(unusable > 0, torch.nan, mean)
    weights = 2.0 * torch.sigmoid(gap - mean.gather(1, group_of_token))
    if clip:
        weights = weights.clamp(1.0 - epsilon, 1.0 + epsilon)
    return torch.where(kept, weights, 0.0).float()


def _check_shapes(nll: Tensor, ref_nll: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> None:
    assert nll.dim() == 2, f"nll must be [b, s], got {nll.shape}"
    assert ref_nll.shape == nll.shape, f"ref_nll {ref_nll.shape} must have the shape of nll {nll.shape}"
    assert mask is None or mask.shape == nll.shape, f"mask {mask.shape} must have the shape of nll {nll.shape}"
    assert segment_ids is None or (segment_ids.shape == nll.shape and segment_ids.dtype == torch.int64), (
        f"segment_ids must be int64 of shape {nll.shape}"
    )
