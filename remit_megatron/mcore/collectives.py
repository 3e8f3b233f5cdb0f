"""Sums over tensor-parallel ranks inside autograd.

Megatron's mappings reduce `x.contiguous()` in place and return `x`: a gradient that is a slice of a larger one comes
back as it was, without an error. These copy first.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself; its gradient is summed over the ranks. For a tensor that all ranks hold and use differently."""
    return _Sum.apply(x, group, False) if group.size() > 1 else x


def sum_both_ways(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the ranks, of which every rank makes something else: so the gradient is summed as well."""
    return _Sum.apply(x, group, True) if group.size() > 1 else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, reduce_forward: bool) -> Tensor:
        ctx.group = group
        return _summed(x, group) if reduce_forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.group), None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
