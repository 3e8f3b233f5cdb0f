"""Multi-head latent attention with plain RoPE, norm before each sublayer: Youtu-LLM."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from remit_megatron.mcore.attention import SDPAttention
from remit_megatron.mcore.collectives import sum_gradients
from remit_megatron.mcore.norm import RMSNorm, mark_sequence_parallel
from remit_megatron.shape import ModelShape

LATENT_NORM_EPSILON = 1e-6
"""Of the norms on the latents, whatever the config says of the others."""


class LatentNorm(RMSNorm):
    def __init__(self, config: Any, hidden_size: int, eps: float = LATENT_NORM_EPSILON, **kwargs: Any):
        super().__init__(config, hidden_size, eps=LATENT_NORM_EPSILON)


class ReplicatedLinear(torch.nn.Module):
    """A linear without bias that every tensor-parallel rank holds whole. x [s or s/tp, b, h] -> ([.., b, out], None).

    shared_tail: the last so many columns feed each rank's own heads, so without sequence parallelism their gradient
    is summed over the ranks here. (With it, gathering them along the sequence does that.)
    """

    def __init__(self, config: Any, input_size: int, output_size: int, tp_group: Any, shared_tail: int = 0):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            config.init_method(self.weight)
        mark_sequence_parallel(self.weight, config.sequence_parallel)
        self.shared_tail = 0 if config.sequence_parallel else shared_tail
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out = F.linear(x, self.weight)
        if self.shared_tail:
            own, shared = out.split([out.size(-1) - self.shared_tail, self.shared_tail], dim=-1)
            out = torch.cat([own, sum_gradients(shared, self.tp_group)], dim=-1)
        return out, None


class LatentAttention(MLASelfAttention):
    """Megatron's MLA with its two down projections replaced by replicated ones.

    Its own are column-parallel and gathered with a backward that keeps this rank's slice: right for the latents, whose
    gradient is equal on all ranks, but wrong for the rotary key, which every rank feeds to other heads.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        # Newer releases refuse a norm in the spec where the flag is off. Left on, it would make finalize_model_grads
        # sum the norms' gradients over tensor-parallel ranks, by name; but they are equal there already.
        config.qk_layernorm = True
        super().__init__(config, *args, **kwargs)
        config.qk_layernorm = False
        tp = self.pg_collection.tp
        kv_width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank, tp)
        self.linear_kv_down_proj = ReplicatedLinear(
            config, config.hidden_size, kv_width, tp, shared_tail=config.qk_pos_emb_head_dim
        )


def layer_spec(shape: ModelShape, use_te: bool) -> Any:
    assert (shape.norm_placement, shape.qk_norm) == ("pre", "none")
    if use_te:
        layer = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=True)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = SDPAttention
        # Transformer Engine fuses this norm into the linear; under its name both read one checkpoint.
        layer.submodules.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    attention = layer.submodules.self_attention
    attention.module = LatentAttention
    attention.submodules.q_layernorm = attention.submodules.kv_layernorm = LatentNorm
    return layer
