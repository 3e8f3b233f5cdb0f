"""Whether a CUDA device is here, told without importing torch, for commands that build no model."""

import ctypes
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from remit_megatron.errors import UserError


def resolve_device(choice: str, cuda_is_here: Callable[[], bool] | None = None) -> str:
    """`auto`, `cpu` or `cuda` to `cpu` or `cuda`. Raises UserError when `cuda` is asked for and absent.

    cuda_is_here: what to ask; default: `torch_would_see_cuda`.
    """
    if choice == "cpu":
        return "cpu"
    found = (cuda_is_here or torch_would_see_cuda)()
    if choice == "cuda" and not found:
        raise UserError("compute.device = 'cuda' but torch sees no CUDA device: use 'cpu', or a CUDA build of torch")
    return "cuda" if found else "cpu"


def torch_would_see_cuda() -> bool:
    """What torch.cuda.is_available() would say: torch is a CUDA build, and the driver counts a device.

    The driver is asked itself, so CUDA_VISIBLE_DEVICES counts. A torch that does not say what it was built for is
    imported and asked.
    """
    built = _torch_is_cuda_build()
    if built is None:
        import torch

        return torch.cuda.is_available()
    return built and _driver_devices() > 0


def _torch_is_cuda_build() -> bool | None:
    """As torch/version.py says. None where it is not as expected."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    cuda, hip = (re.search(rf"^{name}\b[^=\n]*=\s*(.+)$", text, re.MULTILINE) for name in ("cuda", "hip"))
    if cuda is None or (hip is not None and hip[1].strip() != "None"):
        return None
    return cuda[1].strip() != "None"


def _driver_devices() -> int:
    """Devices that the CUDA driver shows to this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
