"""Layer specs: from a model's traits to the Megatron modules of one of its layers.

`local` specs are Megatron's own linears with this package's norm and attention, on CPU and GPU. Specs of
Transformer Engine use its linears, norms and attention. Both read each other's checkpoints.
"""

from typing import Any

from remit_megatron.mcore.families import latent, post_norm, pre_norm
from remit_megatron.shape import ModelShape


def layer_spec(shape: ModelShape, implementation: str) -> Any:
    """The ModuleSpec of every layer of a model. implementation: `local` or `transformer_engine`."""
    use_te = implementation == "transformer_engine"
    if shape.latent is not None:
        return latent.layer_spec(shape, use_te)
    if shape.norm_placement == "post":
        return post_norm.layer_spec(shape, use_te)
    return pre_norm.layer_spec(shape, use_te)
