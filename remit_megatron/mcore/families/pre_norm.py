"""x + attention(norm(x)), then x + mlp(norm(x)): Llama, Qwen2, Qwen3, SmolLM3, and the plain GPT of this package.

Biases, QK norms and layers without positions are settings of Megatron's attention: see `make_config`.
"""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)

from remit_megatron.mcore.attention import SDPAttention
from remit_megatron.mcore.norm import RMSNorm
from remit_megatron.shape import ModelShape


def layer_spec(shape: ModelShape, use_te: bool) -> Any:
    assert shape.qk_norm in ("none", "per_head"), "a full-width QK norm goes with norm_placement = 'post'"
    per_head = shape.qk_norm == "per_head"
    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=per_head)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=per_head)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SDPAttention
    if per_head:
        # Megatron sums their gradients over tensor-parallel ranks by name: each rank has seen its own heads.
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
