"""SmolLM3: Llama with grouped queries, tied embeddings, and no positions in every fourth layer."""

from remit_megatron.errors import UserError
from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, PRE_NORMS, Family, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    fields = decoder_fields(config, tied_default=True)
    layers = fields["num_layers"]
    interval = config.size("no_rope_layer_interval", 4)
    # In spite of its name, a 1 in the list means that the layer does use RoPE.
    uses_rope = config.take("no_rope_layers", None)
    if uses_rope is None:
        uses_rope = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(uses_rope, list) or len(uses_rope) < layers or any(use not in (0, 1) for use in uses_rope):
        raise UserError(f"{config.where}: no_rope_layers must hold a 0 or 1 for each of {layers} layers")
    without = tuple(layer for layer in range(layers) if not uses_rope[layer])
    return ModelShape(family="smollm3", no_rope_layers=without, **fields)


FAMILY = Family(name="smollm3", architecture="SmolLM3ForCausalLM", read=read, layer=PRE_NORMS | ATTENTION | MLP)
