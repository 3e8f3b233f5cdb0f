"""Qwen 2 and 2.5: Llama with biases of query, key and value."""

from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, PRE_NORMS, Family, Names, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    return ModelShape(family="qwen2", qkv_bias=True, **decoder_fields(config))


BIASES: Names = {
    "self_attention.linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
}
FAMILY = Family(name="qwen2", architecture="Qwen2ForCausalLM", read=read, layer=PRE_NORMS | ATTENTION | BIASES | MLP)
