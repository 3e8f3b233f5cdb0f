"""`quantise_rows` of ops/fp8.py as a Triton kernel: a row is read once, kept in registers, and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from remit_megatron.ops.implementation import device_of

COLUMNS_PER_WARP = 1024
MAX_WARPS = 16


@triton.jit
def quantise_rows_kernel(  # type: ignore[no-untyped-def]
    X,  # [n, k] bf16 or fp32, columns side by side; stride below, in elements
    stride_row,
    OUT,  # [n, k] e4m3, written, contiguous
    SCALE,  # [n] fp32, written
    num_columns,  # k
    BLOCK: tl.constexpr,
):
    """One row a program. The scale comes from the bits of the largest number, without a division."""
    r = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < num_columns
    x = tl.load(X + r * stride_row + o, mask=inside, other=0.0).to(tl.float32)
    bits = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    biased = tl.maximum(exponent - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    scale = (biased << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - biased) << 23).to(tl.float32, bitcast=True)
    # The conversion saturates, so an infinity would come out as 448: its row's scale says what it was.
    tl.store(SCALE + r, tl.where(exponent == 255, float("nan"), scale))
    tl.store(OUT + r * num_columns + o, (x * inverse).to(OUT.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(quantise_rows_kernel, triton.JITFunction)
"""Whether Triton's interpreter, which runs on CPU tensors, was chosen before this module was imported."""


def num_warps(block: int) -> int:
    """At 32 columns a thread, until a row is too wide for that."""
    return min(MAX_WARPS, max(1, block // COLUMNS_PER_WARP))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in ops/fp8.py."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return out, write_scaled(x, out)


def write_scaled(x: Tensor, out: Tensor) -> Tensor:
    """Writes x / scale, rounded to its type, into the contiguous `out` [n, k], and returns the scale [n, 1] float32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    n, k = x.shape
    scale = torch.empty(n, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    if n > 0:
        with device_of(x):
            quantise_rows_kernel[(n,)](x, x.stride(0), out, scale, k, BLOCK=block, num_warps=num_warps(block))
    return scale
