"""OLMo 2: each norm acts on its sublayer's output; queries and keys are normalised over all heads at once."""

from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, Family, Names, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    fields = decoder_fields(config)
    return ModelShape(family="olmo2", norm_placement="post", qk_norm="full_width", **fields)


NORMS: Names = {
    "self_attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.post_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc2.post_layernorm.weight": ("post_feedforward_layernorm.weight",),
}
FAMILY = Family(name="olmo2", architecture="Olmo2ForCausalLM", read=read, layer=ATTENTION | MLP | NORMS)
