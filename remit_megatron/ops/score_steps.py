"""Reference scores in 16 bits: unsigned fixed point, 2^-11 nat a step, 0 to 31.9995 nats, saturating."""

import torch
from torch import Tensor

STEPS_PER_NAT = 2048
LARGEST = 65535


def quantise(nll: Tensor) -> Tensor:
    """Steps, int32 in [0, LARGEST], of scores in nats, any shape. A score that is not a number gives -1."""
    steps = (nll.double() * STEPS_PER_NAT).round().clamp(0, LARGEST)
    return torch.where(nll.isnan(), -1, steps.nan_to_num()).int()


def dequantise(steps: Tensor) -> Tensor:
    """Scores in nats, float32, exactly what the steps say."""
    return steps.float() / STEPS_PER_NAT


def round_to_steps(nll: Tensor) -> Tensor:
    """Scores as a cache would give them back, float32; NaN stays NaN."""
    return torch.where(nll.isnan(), nll, dequantise(quantise(nll)))
