"""What a family is, and what most of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.hf.config import Fields, rope
from remit_megatron.shape import ModelShape

Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family of Hugging Face."""

    name: str
    """`model_type` of its config."""
    former_name: str | None = None
    """`model_type` of folders from before transformers knew the family, which came with code of their own."""
    architecture: str
    """The only class that is supported."""
    read: Callable[[Fields], ModelShape]
    """From a config to a shape; reads every key that it understands."""
    layer: Names
    """Parameters of a layer, and the tensors that each holds; both without the layer's prefix."""


ATTENTION: Names = {
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
MLP: Names = {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
PRE_NORMS: Names = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}


def decoder_fields(config: Fields, *, tied_default: bool = False, head_width: int | None = None) -> dict[str, Any]:
    """The fields of a ModelShape that every family has.

    tied_default: of the class in transformers. head_width: `kv_channels`, where head_dim is not what it means.
    """
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    config.expect("hidden_act", "silu", "an activation other than SwiGLU")
    config.expect("attention_bias", False, "a bias of the attention's projections")
    config.expect("mlp_bias", False, "a bias of the feed-forward layer")
    config.expect("use_sliding_window", False, "a sliding window")
    config.expect("use_mrope", False, "a rotary embedding of several dimensions")
    config.expect("add_cross_attention", False, "cross-attention")
    for key in ("sliding_window", "max_window_layers", "layer_types"):
        config.take(key, None)
    kinds = config.values.get("layer_types") or ["full_attention"]
    if set(kinds) != {"full_attention"}:
        raise UserError(f"{config.where}: layer_types: only full_attention is supported, not a sliding window")
    groups = config.size("num_key_value_heads", heads)
    if heads % groups:
        raise UserError(
            f"{config.where}: num_attention_heads = {heads} does not divide by num_key_value_heads = {groups}"
        )
    if head_width is None and config.values.get("head_dim") is None and hidden % heads:
        raise UserError(f"{config.where}: hidden_size = {hidden} does not divide by num_attention_heads = {heads}")
    theta, llama3_factor = rope(config)
    return {
        "num_layers": config.size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_width or config.size("head_dim", hidden // heads),
        "vocab_size": config.size("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", tied_default),
        "rope_theta": theta,
        "rope_llama3_factor": llama3_factor,
        "norm_epsilon": config.number("rms_norm_eps"),
    }
