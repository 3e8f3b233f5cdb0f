"""ReMiT: RL-guided mid-training as a plugin for Megatron-Core.

The two operations that make a training loop ReMiT are exported here. Importing the package imports neither torch nor
megatron: data preparation starts many processes that need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remit_megatron.ops.token_nll import token_nll
    from remit_megatron.ops.weights import remit_weights

__version__ = "0.1.0"

__all__ = ["__version__", "remit_weights", "token_nll"]

_EXPORTS = {"token_nll": "remit_megatron.ops.token_nll", "remit_weights": "remit_megatron.ops.weights"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
