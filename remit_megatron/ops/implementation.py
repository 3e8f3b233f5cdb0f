"""Which implementation of an operation runs, plain torch or Triton kernels. None is taken in another's place."""

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.ops.choices import Implementation

__all__ = ["Implementation", "describe_implementation", "device_of", "triton_kernels"]


def describe_implementation(device_type: str) -> tuple[str, str]:
    """What "auto" means on a device ("cpu", "cuda"): the implementation's name, or "none", and the reason."""
    if device_type != "cuda":
        return "torch", f"the Triton kernels are for CUDA, and the device is {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "none", "triton is not installed: pip install triton, or choose implementation 'torch' by name"
    return "triton", "the device is cuda and triton is installed"


def triton_kernels(implementation: Implementation, device_type: str, module: str) -> Any | None:
    """The module remit_megatron.ops.`module` of Triton kernels where these are to run, None where torch is.

    Raises UserError where what is asked for cannot run on the device.
    """
    assert implementation in ("auto", "torch", "triton"), f"unknown implementation '{implementation}'"
    name: str = implementation
    if name == "auto":
        name, reason = describe_implementation(device_type)
        if name == "none":
            raise UserError(f"no implementation on {device_type}: {reason}")
    if name == "torch":
        return None
    if importlib.util.find_spec("triton") is None:
        raise UserError("implementation 'triton' was asked for, but triton is not installed: pip install triton")
    kernels = importlib.import_module(f"remit_megatron.ops.{module}")
    if device_type != "cuda" and not kernels.INTERPRETED:
        raise UserError(
            f"implementation 'triton' cannot run on {device_type}: use 'torch', or set TRITON_INTERPRET=1 to test"
        )
    return kernels


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
