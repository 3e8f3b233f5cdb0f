"""The FP8 kernel in Triton's interpreter, in a process of its own as interpreted.py.

The interpreter's own conversion to e4m3 is wrong (127.5 becomes 64), so the kernel writes float32 here and torch
rounds, as a GPU does: test_triton.py reads that in the PTX. It also reads bfloat16 below 2^-126 as 0.
"""

import math

import pytest
import torch
from torch import Tensor

from remit_megatron.ops.fp8 import quantise_rows
from remit_megatron.ops.fp8_triton import write_scaled
from tests.ops.test_fp8 import rows


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.full(x.shape, torch.nan)
    scale = write_scaled(x, out)
    return out.to(torch.float8_e4m3fn), scale


def check(x: Tensor) -> None:
    x[x.abs() < 2.0**-126] = 0
    before = x.clone()
    found, scale = quantised(x)
    expected, expected_scale = quantise_rows(x, implementation="torch")
    assert torch.equal(x, before)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [10, 16, 96, 1000, 1024, 2064])
def test_the_bits_of_torch(dtype: torch.dtype, columns: int) -> None:
    check(rows(dtype, columns))


def test_rows_and_columns_apart() -> None:
    x = rows(torch.bfloat16, 128)
    check(x[::3, :48])
    check(x.t()[:, :60])
    check(x[:, :1])
    check(x[:0])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_a_number_stays_none(value: float) -> None:
    x = rows(torch.bfloat16)
    x[11, 5] = value
    found, scale = quantised(x)
    back = found.double() * scale.double()
    assert back[11].isnan().any()
    assert not back[[i for i in range(64) if i != 11]].isnan().any()


def test_the_operation_takes_the_kernel() -> None:
    found, scale = quantise_rows(rows(torch.bfloat16), implementation="triton")
    assert found.dtype is torch.float8_e4m3fn
    assert torch.equal(scale, quantise_rows(rows(torch.bfloat16), implementation="torch")[1])
