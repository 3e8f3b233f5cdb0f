"""Names that settings choose from, in a file that needs no torch."""

from typing import Literal

Implementation = Literal["auto", "torch", "triton"]
"""Of an operation: plain torch, Triton kernels, or what fits the device."""
