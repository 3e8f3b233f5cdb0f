"""Llama 2 and 3, to 3.3 in text, and what shares their architecture."""

from remit_megatron.hf.config import Fields
from remit_megatron.hf.mapping.base import ATTENTION, MLP, PRE_NORMS, Family, decoder_fields
from remit_megatron.shape import ModelShape


def read(config: Fields) -> ModelShape:
    # The configs of Llama 1, Llama 2 and what was trained in their time do not say their base, which is the class's.
    return ModelShape(family="llama", **decoder_fields(config, default_theta=10_000.0))


FAMILY = Family(name="llama", architecture="LlamaForCausalLM", read=read, layer=PRE_NORMS | ATTENTION | MLP)
