"""ReMiT: RL-guided mid-training as a plugin for Megatron-Core.

The two operations that make a training loop ReMiT are exported here; nothing is imported from megatron, and nothing
happens at import.
"""

from remit_megatron.ops.token_nll import token_nll
from remit_megatron.ops.weights import remit_weights

__version__ = "0.1.0"

__all__ = ["__version__", "remit_weights", "token_nll"]
