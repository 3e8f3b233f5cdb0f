"""Everything that touches Megatron-Core.

`RemitGPTModel`, from Megatron-Core 0.19 on also `RemitHybridModel`, and `make_forward_step` turn a Megatron script of
one's own into ReMiT (docs/plugin.md). Importing this package does not import Megatron; naming one of them does.
"""

import importlib
from typing import Any

_EXPORTS = {"RemitGPTModel": "loss_hook", "RemitHybridModel": "hybrid", "make_forward_step": "step"}
__all__ = ["RemitGPTModel", "RemitHybridModel", "make_forward_step"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
