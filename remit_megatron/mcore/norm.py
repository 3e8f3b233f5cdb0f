"""RMSNorm for Megatron's local layer spec: of a whole vector, and of one that is sharded over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable


def _ones(width: int, config: Any) -> torch.nn.Parameter:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=device))


def mark_sequence_parallel(parameter: torch.nn.Parameter, sharded: bool) -> None:
    """Megatron sums the gradients of marked parameters over tensor-parallel ranks, which saw slices of the sequence."""
    marked: Any = parameter
    marked.sequence_parallel = sharded


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last axis.

    Megatron's torch norm refuses sequence parallelism. All it lacks is the mark on the weight, by which Megatron sums
    the weight's gradient over the tensor-parallel ranks, each of which has seen a slice of the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__()
        self.weight = _ones(hidden_size, config)
        mark_sequence_parallel(self.weight, config.sequence_parallel)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class ShardedRMSNorm(torch.nn.Module):
    """RMSNorm over a last axis of `width` that tensor-parallel ranks hold in equal parts: x [..., width/tp].

    One number a token crosses the ranks forward, and one backward. The weight is sharded like x, so its gradient is
    complete on its rank. (A parameter whose name contains `q_layernorm` or `k_layernorm` would be summed over the ranks
    by Megatron's finalize_model_grads: modules of this class must have another name.)
    """

    def __init__(self, config: Any, width: int, tp_group: Any, eps: float):
        super().__init__()
        assert width % tp_group.size() == 0
        self.width = width
        self.tp_group = tp_group
        self.eps = eps
        self.weight = _ones(width // tp_group.size(), config)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _ShardedNorm.apply(x, self.weight, self.width, self.eps, self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class _ShardedNorm(torch.autograd.Function):
    """Keeps x as it came and one number a token; float32 copies of x live inside the calls only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, width: int, eps: float, group: dist.ProcessGroup) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(_sum_over(wide.square().sum(dim=-1, keepdim=True), group) / width + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.width, ctx.group = width, group
        return (weight * (wide * inverse)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normal, grad = x.float() * inverse, grad.float()
        grad_weight = (grad * normal).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad = grad * weight
        # d normal / d x = inverse * (1 - normal normal^T / width), and the inner product runs over all ranks.
        inner = _sum_over((grad * normal).sum(dim=-1, keepdim=True), ctx.group)
        return (inverse * (grad - normal * (inner / ctx.width))).to(x.dtype), grad_weight, None, None, None


def _sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, a fresh contiguous tensor, summed over the ranks in place."""
    if group.size() > 1:
        dist.all_reduce(x, group=group)
    return x
