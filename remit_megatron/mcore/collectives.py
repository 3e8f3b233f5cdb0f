"""A sum over tensor-parallel ranks inside autograd."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself; its gradient is summed over the ranks. For a tensor that all ranks hold and use differently.

    Megatron's mapping of that meaning reduces `grad.contiguous()` in place and returns `grad`: where the gradient is a
    slice of a larger one, it comes back as it was, without an error.
    """
    return _SumGradients.apply(x, group) if group.size() > 1 else x


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
