"""Qwen 3, dense: Llama with a norm of each head's query and key."""

from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, PRE_NORMS, Family, Names, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    config.take("head_dim")  # the class has a default of its own, 128, which is not hidden_size / heads
    return ModelShape(family="qwen3", qk_norm="per_head", **decoder_fields(config))


HEAD_NORMS: Names = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
FAMILY = Family(
    name="qwen3", architecture="Qwen3ForCausalLM", read=read, layer=PRE_NORMS | ATTENTION | HEAD_NORMS | MLP
)
