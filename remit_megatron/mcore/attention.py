"""Scaled-dot-product core attention for Megatron's local layer spec: GQA, context parallelism, document masks.

Runs torch's fused kernels (flash attention on a GPU) and needs no Transformer Engine. Under context parallelism the
ranks hold Megatron's zigzag slices: rank r of c has chunks r and 2c - 1 - r of the 2c chunks of a sample. Keys and
values are gathered, so each rank's memory for them is that of the whole sample; queries and scores stay sliced.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from remit_megatron.ops.context_parallel import zigzag_restore


class SDPAttention(MegatronModule):
    """Causal core attention. q [s/cp, b, heads, d]; k, v [s/cp, b, groups, d or d_v]; out [s/cp, b, heads * d_v].

    `attention_mask` is None, or the document of every input token of the sample, [b, s] int (the whole sample on every
    context-parallel rank): then a token sees its own document only.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: Any = None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0.0, "attention dropout is not supported by the local attention"
        self.cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        # None means 1 / sqrt(width of q), which is also MLA's scale.
        self.scale = softmax_scale if softmax_scale is not None else getattr(config, "softmax_scale", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert attention_bias is None
        assert packed_seq_params is None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            out = self._attend(query, key, value, attention_mask, first=0)
        else:
            key, value = self._gather(key, value, size)
            chunk = query.size(0) // 2
            starts = rank * chunk, (2 * size - 1 - rank) * chunk
            out = torch.cat(
                [
                    self._attend(q, key[: start + chunk], value[: start + chunk], attention_mask, start)
                    for q, start in zip(query.split(chunk), starts, strict=True)
                ]
            )
        return out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, first: int) -> Tensor:
        """Queries at positions first..first+n over the keys 0..first+n. Returns [n, b, heads, d_v]."""
        length, keys = query.size(0), key.size(0)
        mask: Any = None
        if documents is not None:
            visible = documents[:, first : first + length, None] == documents[:, None, :keys]
            mask = visible.tril(diagonal=first)[:, None]
        elif first:
            mask = causal_lower_right(length, keys)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.permute(2, 0, 1, 3)

    def _gather(self, key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
        # One collective for both; backward is a reduce-scatter. torch.distributed.nn.functional.all_gather must not be
        # used: on a gloo sub-group its backward scatters with group-local ranks.
        both = torch.cat([key, value], dim=-1)
        both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=self.cp_group)
        return zigzag_restore(both, size).split([key.size(-1), value.size(-1)], dim=-1)
