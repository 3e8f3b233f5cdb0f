"""What a run will build, decided before anything is allocated: shapes, checkpoints and precision of its models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.errors import UserError
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.reference.online import Reference
from remit_megatron.shape import ModelShape, check_layout, resolve_shape
from remit_megatron.train.checkpoint import Meta, read_meta, resolve_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be built, decided from the recipe and the checkpoints' descriptions before anything is allocated."""

    shape: ModelShape
    init: Path | None
    init_meta: Meta | None
    reference_shape: ModelShape | None
    reference_path: Path | None
    reference_meta: Meta | None
    dtype: torch.dtype


def make_plan(recipe: Recipe, device_type: str) -> Plan:
    """Resolve shapes and paths. Raises UserError for what does not fit together; reads only meta.json files."""
    init = resolve_checkpoint(recipe.model.init, "model.init") if recipe.model.init else None
    init_meta = read_meta(init) if init else None
    shape = resolve_shape(recipe.model, init_meta.model_shape() if init_meta else None)
    check_layout(shape, recipe.parallel, "model")
    if recipe.data.document_mask and recipe.model.implementation == "transformer_engine":
        raise UserError(
            "data.document_mask needs model.implementation = 'local': Transformer Engine's takes no such mask here"
        )
    reference_path = reference_meta = reference_shape = None
    if recipe.reference is not None:
        reference_path = resolve_checkpoint(recipe.reference.path, "reference.path")
        reference_meta = read_meta(reference_path)
        reference_shape = reference_meta.model_shape()
        if reference_shape.vocab_size != shape.vocab_size:
            raise UserError(
                f"reference.path: its vocabulary has {reference_shape.vocab_size} rows, the model's {shape.vocab_size}: "
                "both must have been trained with one tokenizer"
            )
        if reference_meta.step == 0:
            raise UserError(f"reference.path: {reference_path} was saved before its first step: it is untrained")
        check_layout(reference_shape, recipe.parallel, "reference")
    return Plan(
        shape=shape,
        init=init,
        init_meta=init_meta,
        reference_shape=reference_shape,
        reference_path=reference_path,
        reference_meta=reference_meta,
        dtype=training_dtype(recipe, device_type),
    )


def training_dtype(recipe: Recipe, device_type: str) -> torch.dtype:
    """What compute.precision means on a device."""
    precision = recipe.compute.precision
    if precision == "auto":
        precision = "bf16" if device_type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def build_student(recipe: Recipe, plan: Plan, device: torch.device) -> tuple[list[Any], Any]:
    """The student's chunks on this rank, with the weights of model.init where it is given, and their config."""
    build = Build(
        device=device,
        dtype=plan.dtype,
        implementation=recipe.model.implementation,
        recompute=recipe.compute.recompute == "full",
        init_std=recipe.model.init_std,
        loss_implementation=recipe.compute.loss_implementation,
    )
    chunks, config = build_chunks(plan.shape, recipe.parallel, build, max_sequence_length=recipe.data.sequence_length)
    if plan.init is not None:
        dist_checkpoint.load_model(plan.init, chunks)
    return chunks, config


def build_reference(recipe: Recipe, plan: Plan, device: torch.device) -> Reference | None:
    """The frozen reference on this rank, loaded and checked; None when the objective needs none."""
    if recipe.reference is None:
        return None
    assert plan.reference_shape is not None and plan.reference_path is not None
    build = Build(
        device=device,
        dtype=plan.dtype,
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
    )
