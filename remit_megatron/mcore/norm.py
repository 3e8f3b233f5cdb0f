"""RMSNorm for Megatron's local layer spec."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last axis.

    Megatron's torch norm refuses sequence parallelism. All it lacks is the mark on the weight, by which Megatron sums
    the weight's gradient over the tensor-parallel ranks, each of which has seen a slice of the sequence.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if not config.use_cpu_initialization:
            self.weight.data = self.weight.data.to(torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
