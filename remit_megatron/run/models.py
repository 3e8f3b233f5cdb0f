"""The models of a run, built on this rank as the build plan says, with their weights."""

from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.run.build_plan import BuildPlan, training_precision
from remit_megatron.run.hf_source import ensure_converted
from remit_megatron.run.reference import Reference

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_student(recipe: Recipe, plan: BuildPlan, device: torch.device) -> tuple[list[Any], Any]:
    """The student's chunks on this rank, with the weights of model.init where it is given, and their config."""
    build = Build(
        device=device,
        dtype=DTYPES[plan.precision],
        implementation=recipe.model.implementation,
        recompute=recipe.compute.recompute == "full",
        init_std=recipe.model.init_std,
        loss_head=recipe.compute.loss_head,
        loss_implementation=recipe.compute.loss_implementation,
    )
    chunks, config = build_chunks(plan.shape, recipe.parallel, build, max_sequence_length=recipe.data.sequence_length)
    if plan.init is not None:
        ensure_converted(plan.init, plan.init_meta)
        dist_checkpoint.load_model(plan.init, chunks)
    return chunks, config


def build_frozen(recipe: Recipe, plan: BuildPlan, device: torch.device) -> list[Any]:
    """The chunks of `plan.init` on this rank, as a model that is only looked at: its head forms no whole logits."""
    build = Build(
        device=device,
        dtype=DTYPES[plan.precision],
        implementation=recipe.model.implementation,
        loss_implementation=recipe.compute.loss_implementation,
    )
    length = recipe.data.sequence_length
    chunks, _ = build_chunks(plan.shape, recipe.parallel, build, max_sequence_length=length, scorer=True)
    assert plan.init is not None
    dist_checkpoint.load_model(plan.init, chunks)
    return chunks


def build_reference(recipe: Recipe, plan: BuildPlan, device: torch.device, *, load: bool = False) -> Reference | None:
    """The frozen reference on this rank, loaded and checked. None where the recipe has none, or its scores come from
    elsewhere and are neither checked nor ever made here, unless `load` says that it is needed all the same."""
    if recipe.reference is None:
        return None
    if recipe.reference.scores and not recipe.reference.check_samples and not load:
        return None
    if recipe.reference.queue and recipe.reference.queue.fallback == "stop" and not load:
        return None
    assert plan.reference_shape is not None
    assert plan.reference_path is not None
    ensure_converted(plan.reference_path, plan.reference_meta)
    build = Build(
        device=device,
        dtype=DTYPES[plan.precision],
        implementation=recipe.model.implementation,
        loss_implementation=recipe.compute.loss_implementation,
        head_chunk_tokens=recipe.reference.head_chunk_tokens,
    )
    return Reference(
        plan.reference_shape,
        plan.reference_path,
        recipe.parallel,
        build,
        max_sequence_length=recipe.data.sequence_length,
        precision=recipe.reference.precision,
    )


def training_dtype(recipe: Recipe, device_type: str) -> torch.dtype:
    """What compute.precision means on a device."""
    return DTYPES[training_precision(recipe, device_type)]
