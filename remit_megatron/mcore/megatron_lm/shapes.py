"""A model's shape as Megatron-LM's arguments say it, and the way back."""

from argparse import Namespace
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.shape import ModelShape

SHAPE_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("group_query_attention", "kv_channels", "position_embedding_type", "rotary_base", "rotary_percent"),
    *("rotary_interleaved", "use_rope_scaling", "rope_scaling_factor", "no_rope_freq", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "swiglu", "squared_relu", "normalization", "layernorm_epsilon", "norm_epsilon"),
    *(
        "untie_embeddings_and_output_weights",
        "apply_layernorm_1p",
        "layernorm_zero_centered_gamma",
        "multi_latent_attention",
        "q_lora_rank",
    ),
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "max_position_embeddings"),
    *("num_experts", "mtp_num_layers"),
)
"""What makes one model another, whatever the layout; a reference has its own."""
NEUTRAL: dict[str, tuple[Any, str]] = {
    "normalization": ("RMSNorm", "its norms are {}"),
    "add_bias_linear": (False, "its linear layers have biases (--disable-bias-linear is off)"),
    "rotary_percent": (1.0, "only {} of each head is rotated (--rotary-percent)"),
    "position_embedding_type": ("rope", "its positions are {} (--position-embedding-type)"),
    "rotary_interleaved": (False, "its rotation is interleaved (--rotary-interleaved)"),
    "swiglu": (True, "its MLP is not SwiGLU (--swiglu is off)"),
    "apply_layernorm_1p": (False, "its norms' weights are stored minus one (--apply-layernorm-1p)"),
    "layernorm_zero_centered_gamma": (False, "its norms' weights are stored minus one (--apply-layernorm-1p)"),
    "rotary_seq_len_interpolation_factor": (None, "its positions are interpolated"),
    "no_rope_freq": (None, "some layers go without positions (--no-rope-freq)"),
    "num_experts": (None, "it is a mixture of experts (--num-experts)"),
    "mtp_num_layers": (None, "it predicts several tokens (--mtp-num-layers)"),
    "multi_latent_attention": (False, "its attention is latent (--multi-latent-attention)"),
    "qk_l2_norm": (False, "its queries and keys have an L2 norm (--qk-l2-norm)"),
    "attention_output_gate": (False, "its attention is gated (--attention-output-gate)"),
    "experimental_attention_variant": (None, "its attention is {} (--experimental-attention-variant)"),
    "heterogeneous_layers_config_path": (None, "its layers differ (--heterogeneous-layers-config-path)"),
    "window_size": (None, "its attention has a window (--window-size)"),
    "softmax_type": ("vanilla", "its attention's softmax is {} (--softmax-type)"),
    "is_hybrid_model": (False, "it is a hybrid model (--is-hybrid-model)"),
}
"""Arguments that must have one value in a model that this package builds, and what another one means. One that a
version of Megatron-LM does not have counts as neutral."""
LLAMA3_FACTOR = 8.0


def shape_of(arguments: Namespace, where: object, vocab_size: int | None = None) -> ModelShape:
    """The shape of a Megatron-LM model from the arguments in its checkpoint.

    where: what to name in messages. vocab_size: rows without padding; default: all of them, as in Megatron-LM's own
    softmax. Raises UserError for a model that this package does not build, with the reason.
    """
    found = vars(arguments)
    for name, (neutral, meaning) in NEUTRAL.items():
        value = found.get(name, neutral)
        if value != neutral and (value or neutral):
            raise UserError(f"{where}: cannot be read: {meaning.format(value)}, which no model here has")
    try:
        heads = found["num_attention_heads"]
        padded, scaling = found["padded_vocab_size"], found.get("rope_scaling_factor", LLAMA3_FACTOR)
        shape = ModelShape(
            num_layers=found["num_layers"],
            hidden_size=found["hidden_size"],
            ffn_hidden_size=found["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=found["num_query_groups"] if found.get("group_query_attention") else heads,
            kv_channels=found.get("kv_channels") or found["hidden_size"] // heads,
            vocab_size=padded if vocab_size is None else vocab_size,
            tied_embeddings=not found["untie_embeddings_and_output_weights"],
            rope_theta=float(found["rotary_base"]),
            norm_epsilon=found.get("layernorm_epsilon") or found["norm_epsilon"],
            qk_norm="per_head" if found.get("qk_layernorm") else "none",
            qkv_bias=bool(found.get("add_qkv_bias")),
            rope_llama3_factor=scaling if found.get("use_rope_scaling") else None,
        )
    except KeyError as missing:
        raise UserError(f"{where}: its arguments have no {missing.args[0]}") from None
    if vocab_size is not None and vocab_size > padded:
        raise UserError(f"{where}: it has {padded} rows of the vocabulary, fewer than {vocab_size}")
    return shape


def arguments_of(shape: ModelShape, where: object) -> dict[str, Any]:
    """Megatron-LM's arguments that say a shape. Raises UserError for one that its gpt_builder cannot build."""
    for has, what in (
        (shape.norm_placement != "pre", "norms after the sublayers"),
        (shape.qk_norm == "full_width", "a norm over all heads of queries and keys"),
        (shape.latent is not None, "latent attention"),
        (bool(shape.no_rope_layers), "layers without positions"),
    ):
        if has:
            raise UserError(f"{where}: Megatron-LM's gpt_builder builds no model with {what}")
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "kv_channels": shape.kv_channels,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rope_theta) if shape.rope_theta == int(shape.rope_theta) else shape.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": shape.rope_llama3_factor is not None,
        "rope_scaling_factor": shape.rope_llama3_factor or LLAMA3_FACTOR,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm == "per_head",
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "norm_epsilon": shape.norm_epsilon,
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        "apply_layernorm_1p": False,
        "multi_latent_attention": False,
        "num_experts": None,
        "mtp_num_layers": None,
        "padded_vocab_size": shape.vocab_size,
    }
