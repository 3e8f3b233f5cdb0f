"""What a family is, and what most of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.hf.config import MAX_LAYERS, Fields, rope
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


def decoder_fields(
    config: Fields, *, tied_default: bool = False, head_width: int | None = None, default_theta: float | None = None
) -> dict[str, Any]:
    """The fields of a ModelShape that every family has.

    tied_default: of the class in transformers. head_width: `kv_channels`, where head_dim is not what it means.
    default_theta: base of the rotary embedding, where published configs leave it to the class.
    """
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    config.expect("hidden_act", "silu", "an activation other than SwiGLU")
    config.expect("attention_bias", False, "a bias of the attention's projections")
    config.expect("mlp_bias", False, "a bias of the feed-forward layer")
    config.expect("use_sliding_window", False, "a sliding window")
    config.expect("rope_interleaved", False, "an interleaved rotary embedding")
    config.expect("use_mrope", False, "a rotary embedding of several dimensions")
    config.expect("add_cross_attention", False, "cross-attention")
    for key in ("sliding_window", "max_window_layers", "layer_types"):
        config.take(key, None)
    kinds = config.values.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{config.where}: layer_types: only full_attention is supported, not a sliding window")
    groups = config.size("num_key_value_heads", heads)
    if heads % groups:
        raise UserError(
            f"{config.where}: num_attention_heads = {heads} does not divide by num_key_value_heads = {groups}"
        )
    if head_width is None and config.values.get("head_dim") is None and hidden % heads:
        raise UserError(f"{config.where}: hidden_size = {hidden} does not divide by num_attention_heads = {heads}")
    theta, llama3_factor = rope(config, default_theta)
    return {
        "num_layers": config.size("num_hidden_layers", largest=MAX_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": config.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_width or config.size("head_dim", hidden // heads),
        "vocab_size": config.size("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", tied_default),
        "rope_theta": theta,
        "rope_llama3_factor": llama3_factor,
        "norm_epsilon": config.number("rms_norm_eps", 1e-12, 0.1),
    }


def layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their names without the layer's prefix, those of every family."""
    h, ffn, heads, groups = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads, shape.num_query_groups
    width = shape.kv_channels
    norm_widths = (heads * width, groups * width) if shape.qk_norm == "full_width" else (width, width)
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "post_feedforward_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (ffn, h),
        "mlp.up_proj.weight": (ffn, h),
        "mlp.down_proj.weight": (h, ffn),
        "self_attn.q_proj.weight": (heads * width, h),
        "self_attn.k_proj.weight": (groups * width, h),
        "self_attn.v_proj.weight": (groups * width, h),
        "self_attn.o_proj.weight": (h, heads * width),
        "self_attn.q_proj.bias": (heads * width,),
        "self_attn.k_proj.bias": (groups * width,),
        "self_attn.v_proj.bias": (groups * width,),
        "self_attn.q_norm.weight": norm_widths[:1],
        "self_attn.k_norm.weight": norm_widths[1:],
    }
    if shape.latent is not None:
        m = shape.latent
        found |= {
            "self_attn.q_a_proj.weight": (m.q_lora_rank, h),
            "self_attn.q_a_layernorm.weight": (m.q_lora_rank,),
            "self_attn.q_b_proj.weight": (heads * width, m.q_lora_rank),
            "self_attn.kv_a_proj_with_mqa.weight": (m.kv_lora_rank + m.qk_rope_head_dim, h),
            "self_attn.kv_a_layernorm.weight": (m.kv_lora_rank,),
            "self_attn.kv_b_proj.weight": (heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank),
            "self_attn.o_proj.weight": (h, heads * m.v_head_dim),
        }
    return found
