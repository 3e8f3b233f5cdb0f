"""Stored scores in 16 bits: unsigned fixed point, a quantum of 2^-11 nat, 0 to 31.9995 nats, saturating."""

import torch
from torch import Tensor

QUANTA_PER_NAT = 2048
LARGEST = 65535


def quantise(nll: Tensor) -> Tensor:
    """Quanta, int32 in [0, LARGEST], of scores in nats, any shape. A score that is not a number gives -1."""
    quanta = (nll.double() * QUANTA_PER_NAT).round().clamp(0, LARGEST)
    return torch.where(nll.isnan(), -1, quanta.nan_to_num()).int()


def dequantise(quanta: Tensor) -> Tensor:
    """Scores in nats, float32, exactly what the quanta say."""
    return quanta.float() / QUANTA_PER_NAT


def round_to_quanta(nll: Tensor) -> Tensor:
    """Scores as a cache would give them back, float32; NaN stays NaN."""
    return torch.where(nll.isnan(), nll, dequantise(quantise(nll)))
