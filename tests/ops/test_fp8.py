"""Rows in FP8 against their definition in exact arithmetic: the scale, and the nearest of all e4m3 numbers."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.ops.fp8 import quantise_rows

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""All that are not negative, in order: 0 to 448."""


def rows(dtype: torch.dtype, columns: int = 96) -> Tensor:
    """Magnitudes from 1e-9 to 1e9, and rows at the edges."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, columns, generator=generator) * torch.logspace(-9, 9, 64)[:, None]).to(dtype)
    x[3] = 0
    x[4] = 448.0  # exactly the largest number
    x[5] = -447.9
    x[6, 1:] = 0
    x[7] *= torch.logspace(-6, 0, columns)  # most of it below e4m3's normal range
    x[8] = 2.0**-130  # below what the smallest scale reaches
    x[9, ::2] = 17 / 16  # ties between two e4m3 numbers of a row with scale 1
    x[9, 1::2] = 448.0
    return x


def exact_scale(row: Tensor) -> Fraction:
    """The smallest power of two, 2^-126 at least, that brings the row's largest number to 448 or less."""
    largest = Fraction(float(row.double().abs().max()))
    exponent = -126
    while largest > 448 * Fraction(2) ** exponent:
        exponent += 1
    return Fraction(2) ** exponent


def nearest(x: Tensor) -> Tensor:
    """The nearest e4m3 number of each of x, |x| <= 448; of two as near, the one whose last bit is 0."""
    place = torch.searchsorted(E4M3, x.abs()).clamp(1, 126)
    low, high = E4M3[place - 1], E4M3[place]
    up = (x.abs() - low > high - x.abs()) | ((x.abs() - low == high - x.abs()) & (place % 2 == 0))
    return torch.where(up, high, low).copysign(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_nearest(dtype: torch.dtype) -> None:
    x = rows(dtype)
    quantised, scale = quantise_rows(x)
    assert (quantised.dtype, quantised.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (64, 1))
    assert [Fraction(float(one)) for one in scale] == [exact_scale(row) for row in x]
    assert torch.equal(quantised.double(), nearest(x.double() / scale.double()))
    largest = quantised.double().abs().amax(dim=1)
    wide = x.double().abs().amax(dim=1) > 448 * 2.0**-126
    assert (largest[wide] >= 224).all(), "the upper half of the range is used"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_a_number_stays_none(value: float) -> None:
    x = rows(torch.bfloat16)
    x[11, 5] = value
    quantised, scale = quantise_rows(x)
    back = quantised.double() * scale.double()
    assert back[11].isnan().any()
    assert not back[[i for i in range(64) if i != 11]].isnan().any()


def test_implementation_is_not_replaced() -> None:
    with pytest.raises(UserError, match="implementation 'triton' cannot run on cpu"):
        quantise_rows(rows(torch.bfloat16), implementation="triton")
