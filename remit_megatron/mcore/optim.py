"""Megatron's DDP, (distributed) AdamW and parameter scheduler in tokens, with a step that refuses bad gradients."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from remit_megatron.config import Optimizer, Parallel, Schedule


def wrap_ddp(chunks: list[Any], config: Any, parallel: Parallel) -> list[Any]:
    """DistributedDataParallel around each chunk, gradients accumulated and reduced in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # Buckets let reduction start early; chunks after the first are needed last, so they do without.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    single = len(wrapped) == 1
    if parallel.overlap_grad_reduce:
        config.no_sync_func = wrapped[0].no_sync if single else [chunk.no_sync for chunk in wrapped]
    if parallel.overlap_param_gather:
        config.param_sync_func = wrapped[0].start_param_sync if single else [c.start_param_sync for c in wrapped]
    return wrapped


def build_optimizer(
    chunks: list[Any], settings: Optimizer, schedule: Schedule, parallel: Parallel, dtype: torch.dtype
) -> tuple[Any, OptimizerParamScheduler]:
    """AdamW without decay on norms, and a scheduler whose unit is the token."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.peak_lr,
        min_lr=settings.min_lr,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad_norm,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    vectors = ParamKey(predicate=ParamPredicate(name="vectors", fn=lambda param: param.ndim == 1))
    optimizer = get_megatron_optimizer(config, chunks, config_overrides={vectors: {"wd_mult": 0.0}})
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.peak_lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=schedule.warmup_tokens,
        lr_decay_steps=schedule.train_tokens,
        lr_decay_style="WSD" if schedule.decay == "wsd" else schedule.decay,
        wsd_decay_steps=schedule.wsd_decay_tokens,
        lr_wsd_decay_style=schedule.wsd_shape,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=schedule.train_tokens,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


@torch.no_grad()
def optimizer_step(optimizer: Any, clip_grad_norm: float) -> tuple[bool, float]:
    """Clip and update. Returns (updated, gradient norm before clipping).

    Where the norm is not finite nothing is updated. The norm is summed over every rank that holds other parameters or
    other optimizer shards, so all ranks decide alike. Megatron's own step checks only where a loss scaler is in use.
    """
    found_inf = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(grad_norm):
        return False, grad_norm
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if clip_grad_norm > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, clip_grad_norm, grad_norm)
    return optimizer.step_with_ready_grads(), grad_norm


def zero_grads(chunks: list[Any], optimizer: Any) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def learning_rate(scheduler: OptimizerParamScheduler) -> float:
    return scheduler.get_lr({})


def advance(scheduler: OptimizerParamScheduler, tokens: int) -> None:
    """Set the scheduler to `tokens` tokens trained: its rates are a function of that number alone."""
    scheduler.num_steps = 0
    scheduler.step(increment=tokens)
