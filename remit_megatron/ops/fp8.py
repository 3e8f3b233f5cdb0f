"""Numbers in FP8: e4m3 with one scale, a power of two, for each row.

Scaling by a power of two is exact in any floating-point type, so a number is rounded once, to 4 bits.
"""

import torch
from torch import Tensor

from remit_megatron.ops.implementation import Implementation, triton_kernels

# A float32 is sign, 8 bits of exponent with bias 127, 23 bits of mantissa; the largest e4m3 is 448 = 1.75 x 2^8.
MANTISSA_BITS = 23
LARGEST_EXPONENT = 8
LARGEST_MANTISSA = 0x600000


def quantise_rows(x: Tensor, *, implementation: Implementation = "auto") -> tuple[Tensor, Tensor]:
    """x [n, k] bfloat16 or float32 -> (e4m3 [n, k], scale [n, 1] float32) with x = e4m3 * scale, up to rounding.

    A row's scale is the smallest power of two, 2^-126 at least, that brings the row's largest number within e4m3's
    448. A row that holds an infinity or NaN gets the scale NaN, or NaN where x has it: its products are NaN either way.

    implementation: "torch", "triton" (one read of x and one write), or "auto": Triton on CUDA, torch on CPU. Both give
    the same bits for rows of numbers. Raises UserError where it cannot run.
    """
    kernels = triton_kernels(implementation, x.device.type, "fp8_triton")
    if kernels is not None:
        quantised: tuple[Tensor, Tensor] = kernels.quantise_rows(x)
        return quantised
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    bits = largest.view(torch.int32)
    exponent = (bits >> MANTISSA_BITS) & 0xFF
    over = (bits & ((1 << MANTISSA_BITS) - 1)) > LARGEST_MANTISSA
    biased = (exponent - LARGEST_EXPONENT + over.int()).clamp_min(1)
    inverse = ((254 - biased) << MANTISSA_BITS).view(torch.float32)
    scale = (biased << MANTISSA_BITS).view(torch.float32).masked_fill(exponent == 255, torch.nan)
    return (x * inverse.to(x.dtype)).to(torch.float8_e4m3fn), scale
