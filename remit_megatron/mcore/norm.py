"""RMSNorm for Megatron's local layer spec: of a whole vector, and of one that is sharded over tensor-parallel ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from remit_megatron.mcore.collectives import sum_both_ways


def _ones(width: int, config: Any) -> torch.nn.Parameter:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=device))


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last axis.

    Megatron's torch norm refuses sequence parallelism. All it lacks is the mark on the weight, by which Megatron sums
    the weight's gradient over the tensor-parallel ranks, each of which has seen a slice of the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__()
        self.weight = _ones(hidden_size, config)
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class ShardedRMSNorm(torch.nn.Module):
    """RMSNorm over a last axis of `width` that tensor-parallel ranks hold in equal parts: x [..., width/tp].

    The sum of squares, [..., 1], crosses the ranks once forward and once backward. The weight is sharded like x, so
    its gradient is complete on its rank. (A parameter whose name contains `q_layernorm` or `k_layernorm` would be
    summed over the ranks by Megatron's finalize_model_grads: modules of this class must have another name.)
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
        wide = x.float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        squares = sum_both_ways(squares, self.tp_group)
        return (self.weight * (wide * torch.rsqrt(squares / self.width + self.eps))).to(x.dtype)

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
