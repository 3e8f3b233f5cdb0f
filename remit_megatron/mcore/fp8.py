"""FP8 linears for a frozen model: e4m3 with a scale for each token and each output row, and a product by torch.

Only Megatron's parallel linears inside the layers change; norms, attention, the head and whatever else stay as they
are.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.compat import describe_fp8
from remit_megatron.ops.fp8 import quantise_rows
from remit_megatron.ops.implementation import Implementation


class Fp8Product:
    """Takes the place of a frozen Megatron linear's matrix product; its weight is quantised once, here."""

    def __init__(self, linear: Any, name: str, implementation: Implementation):
        rows, columns = linear.weight.shape
        if rows % 16 or columns % 16:
            raise UserError(
                f"reference.precision = 'fp8': {name} is {rows} x {columns} on each rank, and FP8 products need "
                "multiples of 16: lower parallel.tensor, or use precision = 'same'"
            )
        self.implementation = implementation
        quantised, scale = quantise_rows(linear.weight.detach(), implementation=implementation)
        self.weight, self.scale = quantised.t(), scale.t()
        self.original = linear._forward_impl
        self.enabled = True

    def __call__(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        """input [s or s/tp, b, k] -> [s, b, n] of the input's dtype, as Megatron's linear of the same arguments."""
        if not self.enabled:
            return self.original(input=input, weight=weight, **settings)
        if settings["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=False, group=settings["tp_group"]
            )
        x, scale = quantise_rows(input.flatten(0, -2), implementation=self.implementation)
        out = torch._scaled_mm(x, self.weight, scale, self.scale, out_dtype=input.dtype, use_fast_accum=True)
        out = out.view(*input.shape[:-1], -1)
        return out if settings["bias"] is None else out + settings["bias"]


def quantise(
    chunks: list[Any], device: torch.device, dtype: torch.dtype, implementation: Implementation = "auto"
) -> list[Fp8Product]:
    """Let the linears of a frozen model's layers multiply in FP8. The weights themselves stay, unchanged.

    implementation: of the quantisation, see `quantise_rows`.

    Returns the products that were put in. Raises UserError where FP8 cannot run, for weights whose sizes are no
    multiples of 16, and for a model without Megatron's own linears (Transformer Engine's).
    """
    able, reason = describe_fp8(device.type)
    if not able:
        raise UserError(f"reference.precision = 'fp8' cannot run here: {reason}")
    if device.type == "cuda" and dtype is not torch.bfloat16:
        raise UserError("reference.precision = 'fp8' needs compute.precision = 'bf16' on CUDA")
    products = []
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and "output_layer" not in name:
                module._forward_impl = Fp8Product(module, name, implementation)
                products.append(module._forward_impl)
    if not products:
        raise UserError("reference.precision = 'fp8' needs model.implementation = 'local': found no linear to convert")
    return products


@contextlib.contextmanager
def disabled(products: list[Fp8Product]) -> Iterator[None]:
    """Inside, the model multiplies in its own precision again."""
    for product in products:
        product.enabled = False
    try:
        yield
    finally:
        for product in products:
            product.enabled = True
