"""x + norm(attention(x)), then x + norm(mlp(x)), with a QK norm over all heads at once: OLMo-2.

Megatron's layer has no place for a norm after a sublayer, so it is part of the linear that ends the sublayer.
(`apply_residual_connection_post_layernorm` of its config is another thing: it moves the residual.)
"""

import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from remit_megatron.mcore.attention import SDPAttention
from remit_megatron.mcore.compat import submodules_of
from remit_megatron.mcore.norm import RMSNorm, ShardedRMSNorm
from remit_megatron.shape import ModelShape


class FullWidthNormAttention(SelfAttention):
    """Self-attention whose queries and keys, [s, b, heads/tp, d], are normalised over all heads of a token."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        heads, groups = config.num_attention_heads, config.num_query_groups
        eps, group = config.layernorm_epsilon, self.pg_collection.tp
        self.q_norm = ShardedRMSNorm(config, heads * config.kv_channels, group, eps)
        self.k_norm = ShardedRMSNorm(config, groups * config.kv_channels, group, eps)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.q_norm(query.flatten(2)).view_as(query), self.k_norm(key.flatten(2)).view_as(key), value


@functools.cache
def followed_by_norm(linear: type) -> type:
    """A subclass of a row-parallel linear whose output, [s/tp, b, h] or [s, b, h], passes through an RMSNorm."""

    class RowParallelThenNorm(linear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            out, bias = super().forward(*args, **kwargs)
            assert bias is None
            return self.post_layernorm(out), None

    return RowParallelThenNorm


def layer_spec(shape: ModelShape, use_te: bool) -> Any:
    assert (shape.qk_norm, shape.qkv_bias) == ("full_width", False)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = layer.submodules.self_attention, submodules_of(layer.submodules.mlp)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    # Its prefixes stand for norms that the layer does not have.
    layer.submodules.sharded_state_dict_keys_map = {}
    attention.module = FullWidthNormAttention
    row_parallel = RowParallelLinear
    attention.submodules.core_attention = SDPAttention
    if use_te:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TERowParallelLinear,
        )

        row_parallel = TERowParallelLinear
        attention.submodules.core_attention = TEDotProductAttention
        attention.submodules.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    attention.submodules.linear_proj = mlp.linear_fc2 = followed_by_norm(row_parallel)
    return layer
