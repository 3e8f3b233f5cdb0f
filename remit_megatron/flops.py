"""Model FLOP utilisation: what a step has to compute over what the device could."""

from typing import TYPE_CHECKING

from remit_megatron.shape import ModelShape

if TYPE_CHECKING:
    import torch

PEAK_DENSE_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""FLOP/s without sparsity, from the vendor's data sheets; the first name that the device's name holds."""


def training_flops_per_token(shape: ModelShape, reference: ModelShape | None, sequence_length: int) -> float:
    """Forward and backward of the student (three forwards), and one forward of the reference."""
    total = 3 * shape.flops_per_token(sequence_length)
    return total + (reference.flops_per_token(sequence_length) if reference else 0.0)


def peak_flops(device: "torch.device") -> float | None:
    """The device's dense bf16 peak; None on a CPU or an unknown device: then no utilisation is reported."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_DENSE_BF16.items() if word in name), None)
