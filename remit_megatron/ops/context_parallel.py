"""Whole samples and the parts of them that context-parallel ranks hold.

Rank r of c has the chunks r and 2c - 1 - r of the 2c equal chunks of a sample, which is Megatron's zigzag: under causal
attention every rank then has the same work.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_slice(x: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    """A context-parallel rank's chunks `rank` and `2 * size - 1 - rank` of `x` along `dim`; of one rank, x itself."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=dim)


def zigzag_restore(gathered: Tensor, size: int) -> Tensor:
    """Ranks' zigzag slices, concatenated in rank order along dim 0, to the natural order of the sample."""
    chunks = gathered.chunk(2 * size, dim=0)
    low, high = chunks[0::2], chunks[1::2]
    return torch.cat([*low, *reversed(high)], dim=0)


@torch.no_grad()
def gather_samples(values: list[Tensor], positions: Tensor | None, cp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each of `values` [b, s] as float64 [b, S] in the order of positions, the same on every context-parallel rank.

    positions: [s] int64, the place of each local token in the whole sample of S = s * cp_size tokens. None: 0..s-1,
    where samples are whole. One all-gather of [len(values) * b + 1, s] float64 where `cp_group` has several ranks.
    """
    size = 1 if cp_group is None else dist.get_world_size(cp_group)
    b, s = values[0].shape
    if size == 1:
        return [value.double() if positions is None else _placed(value.double(), positions) for value in values]
    assert positions is not None, "parts of samples need their positions"
    packed = torch.cat([*(value.double() for value in values), positions.double()[None]])
    flat = torch.empty(size * packed.numel(), dtype=torch.float64, device=packed.device)
    dist.all_gather_into_tensor(flat, packed.flatten(), group=cp_group)
    rows = flat.view(size, len(values) * b + 1, s).transpose(0, 1).flatten(1)
    whole = _placed(rows[:-1], rows[-1].long())
    return list(whole.split(b))


def local_part(whole: Tensor, positions: Tensor | None) -> Tensor:
    """The columns [b, s] of whole samples [b, S] that this rank holds."""
    return whole if positions is None else whole.index_select(1, positions)


def _placed(rows: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(rows).index_copy_(1, positions, rows)
