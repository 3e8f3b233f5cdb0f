"""Llama 2 and 3, to 3.3 in text, and what shares their architecture."""

from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, PRE_NORMS, Family, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    return ModelShape(family="llama", **decoder_fields(config))


FAMILY = Family(name="llama", architecture="LlamaForCausalLM", read=read, layer=PRE_NORMS | ATTENTION | MLP)
