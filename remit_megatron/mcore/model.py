"""From a model shape and a layout to Megatron model chunks: the student and the frozen reference beside it."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore import compat
from remit_megatron.mcore.families import layer_spec
from remit_megatron.mcore.loss_hook import LossHook, RemitGPTModel
from remit_megatron.mcore.norm import RMSNorm
from remit_megatron.ops.implementation import Implementation
from remit_megatron.optional import check_implementation
from remit_megatron.shape import ModelShape, check_layout

HEAD_CHUNK_TOKENS = 2048
"""Tokens of a scorer whose logits exist at one time, where nothing says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How a model is built, apart from its shape."""

    device: torch.device
    dtype: torch.dtype
    implementation: str = "local"
    """`local` or `transformer_engine`."""
    stack: str = "gpt"
    """`gpt` or `hybrid`: which of Megatron-Core's models holds the layers; see `mcore/hybrid.py`."""
    recompute: bool = False
    init_std: float = 0.02
    initialize: bool = True
    """False: weights are left as allocated, for a model that is about to be filled."""
    loss_head: str = "logits"
    """Of a student; see RemitGPTModel."""
    loss_implementation: Implementation = "auto"
    head_chunk_tokens: int = HEAD_CHUNK_TOKENS


def make_config(shape: ModelShape, parallel: Parallel, build: Build) -> TransformerConfig:
    """Megatron's config. A student and its reference each need their own: p2p shapes and sync hooks live on it."""
    on_cpu = build.device.type == "cpu"
    interleaved = parallel.virtual_pipeline > 1
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kind, traits = _traits(shape)
    if build.stack == "hybrid":
        traits |= _as_pairs(shape, traits)
    return kind(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=build.init_std,
        perform_initialization=build.initialize,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        params_dtype=build.dtype,
        pipeline_dtype=build.dtype,
        bf16=build.dtype is torch.bfloat16,
        # The only normalisation that is exact under ragged masks and context parallelism.
        calculate_per_token_loss=True,
        # Initial weights then depend on the seed alone, not on the tensor-parallel layout.
        use_cpu_initialization=on_cpu,
        # With two interleaved stages batched p2p mixes activations and gradients without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # On gloo a freed output races with the send that still reads it.
        deallocate_pipeline_outputs=not on_cpu,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=False,
        cross_entropy_loss_fusion=False,
        **traits,
        **(recompute if build.recompute else {}),
    )


def _traits(shape: ModelShape) -> tuple[type[TransformerConfig], dict[str, Any]]:
    """What a shape's traits are called in Megatron's config, and the class of that config."""
    traits: dict[str, Any] = {"num_layers": shape.num_layers, "add_qkv_bias": shape.qkv_bias}
    # The flag makes finalize_model_grads sum gradients over tensor-parallel ranks, which only per-head norms need.
    traits["qk_layernorm"] = shape.qk_norm == "per_head"
    if shape.no_rope_layers:
        # 1 means that the layer goes without; Hugging Face's no_rope_layers has it the other way round.
        traits["no_rope_freq"] = [int(layer in shape.no_rope_layers) for layer in range(shape.num_layers)]
    if shape.latent is None:
        return TransformerConfig, traits
    sizes = {
        "q_lora_rank": shape.latent.q_lora_rank,
        "kv_lora_rank": shape.latent.kv_lora_rank,
        "qk_head_dim": shape.latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": shape.latent.qk_rope_head_dim,
        "v_head_dim": shape.latent.v_head_dim,
    }
    # Defaults are those of a YaRN model with a factor of 40.
    rope = {"rope_type": "rope", "rotary_base": shape.rope_theta, "rotary_scaling_factor": 1.0}
    return MLATransformerConfig, {**traits, **sizes, **rope, "apply_rope_fusion": False}


def _as_pairs(shape: ModelShape, traits: dict[str, Any]) -> dict[str, Any]:
    """The traits that differ where attention and MLP are layers of their own."""
    pairs: dict[str, Any] = {"num_layers": 2 * shape.num_layers, "is_hybrid_model": True}
    if "no_rope_freq" in traits:
        pairs["no_rope_freq"] = [flag for layer in traits["no_rope_freq"] for flag in (layer, 0)]
    return pairs


def _block_spec(shape: ModelShape, config: TransformerConfig, implementation: str, vp_stage: int | None) -> Any:
    check_implementation(implementation)
    if implementation == "transformer_engine":
        return layer_spec(shape, implementation)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(shape, implementation)] * layers, layer_norm=RMSNorm)


def build_chunks(
    shape: ModelShape,
    parallel: Parallel,
    build: Build,
    *,
    max_sequence_length: int,
    scorer: bool = False,
) -> tuple[list[Any], TransformerConfig]:
    """This rank's model chunks (one, or one per virtual stage), bare or in Float16Module, and their config.

    `scorer` builds a frozen reference. Raises UserError when the layout does not divide the shape.
    """
    check_layout(shape, parallel, "reference" if scorer else "model")
    config = make_config(shape, parallel, build)
    one = functools.partial(_build_chunk, shape, parallel, build, config, max_sequence_length, scorer)
    if parallel.virtual_pipeline > 1:
        return [one(stage) for stage in range(parallel.virtual_pipeline)], config
    return [one(None)], config


def _build_chunk(
    shape: ModelShape,
    parallel: Parallel,
    build: Build,
    config: TransformerConfig,
    max_sequence_length: int,
    scorer: bool,
    vp_stage: int | None,
) -> Any:
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    common = dict(
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, **stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, **stage),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="none" if shape.latent else "rope",
        rotary_base=shape.rope_theta,
        valid_vocab=shape.vocab_size,
        scorer=scorer,
        head_chunk_tokens=build.head_chunk_tokens,
        loss_head=build.loss_head,
        loss_implementation=build.loss_implementation,
        **stage,
    )
    vocab = shape.padded_vocab(parallel.tensor)
    model: LossHook
    if build.stack == "hybrid":
        model = _hybrid().build(shape, parallel, build.implementation, config, vocab, max_sequence_length, common)
    else:
        model = RemitGPTModel(
            config,
            _block_spec(shape, config, build.implementation, vp_stage),
            vocab,
            max_sequence_length,
            rope_scaling=shape.rope_llama3_factor is not None,
            rope_scaling_factor=shape.rope_llama3_factor or 1.0,
            **common,
        )
    if build.device.type == "cuda":
        model.cuda(build.device)
    chunk = Float16Module(config, model) if build.dtype is torch.bfloat16 else model
    if scorer:
        chunk.eval().requires_grad_(False)
    return chunk


def _hybrid() -> Any:
    """The module for HybridModel. Raises UserError where this Megatron-Core has none that serves."""
    if not compat.has_hybrid_model():
        raise UserError(
            f"stack = 'hybrid' needs the HybridModel of Megatron-Core 0.19 or newer, and "
            f"{compat.version('megatron-core')} is installed: use stack = 'gpt'"
        )
    from remit_megatron.mcore import hybrid

    return hybrid
