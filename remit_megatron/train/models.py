"""What a run will build, decided before anything is allocated: shapes, checkpoints and precision of its models."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.hf.folder import is_hf_folder
from remit_megatron.hf.pairing import common_rows
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.graph import check_graph
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.presets import check_preset, preset_shape
from remit_megatron.reference.online import Reference
from remit_megatron.shape import ModelShape, check_layout, resolve_shape
from remit_megatron.train.checkpoint import CheckpointFolder, Meta, identity, read_meta, resolve_checkpoint
from remit_megatron.train.hf_source import ensure_converted, plan_conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be built, decided from the recipe and the checkpoints' descriptions before anything is allocated."""

    shape: ModelShape
    common_rows: int
    """Ids that student and reference both have a row for: every dataset stays below."""
    note: str | None
    """What to say of the two, once."""
    init: Path | None
    init_meta: Meta | None
    reference_shape: ModelShape | None
    reference_path: Path | None
    reference_meta: Meta | None
    reference_identity: str | None
    """Content of the reference's checkpoint; see `checkpoint.identity`. None where it is still to be converted."""
    resume: Path | None
    """The run's own newest checkpoint, to go on from; then nothing is taken from model.init."""
    dtype: torch.dtype


def make_plan(recipe: Recipe, device_type: str, resume: Path | None = None) -> Plan:
    """Resolve shapes and paths. resume: one of the run's checkpoints; default: the newest.

    Raises UserError for what does not fit together; reads meta.json and Hugging Face configs, and the bytes of a
    Hugging Face folder for their hash.
    """
    checkpoints = CheckpointFolder(Path(recipe.run) / "checkpoints", keep=1)
    resume = resume or checkpoints.latest()
    init, init_meta = None, None
    if resume:
        try:
            init_meta = read_meta(resume)
        except DamagedError as error:
            raise checkpoints.refusal(resume, error) from None
    if recipe.model.init and not resume:
        init, init_meta = find_model(recipe.model.init, "model.init", recipe)
    shape = student_shape(recipe, init_meta.model_shape() if init_meta else None)
    check_layout(shape, recipe.parallel, "model")
    check_graph(recipe, device_type)
    check_document_mask(recipe)
    reference_path = reference_meta = reference_shape = None
    rows, note = shape.vocab_size, None
    if recipe.reference is not None:
        reference_path, reference_meta = find_model(recipe.reference.path, "reference.path", recipe)
        reference_shape = reference_meta.model_shape()
        distributions = getattr(recipe.build_objective(), "needs_reference_hidden", False)
        rows, note = common_rows(
            (shape.vocab_size, reference_shape.vocab_size),
            (_tokenizer(init_meta), _tokenizer(reference_meta)),
            needs_distribution=distributions,
            allow_added_tokens=recipe.reference.allow_added_tokens,
        )
        if distributions and note:
            raise UserError(
                f"{note}, which this loss does not do: choose an objective that reads the label's loss only"
            )
        if reference_meta.step == 0 and reference_meta.origin is None:
            raise UserError(f"reference.path: {reference_path} was saved before its first step: it is untrained")
        check_layout(reference_shape, recipe.parallel, "reference")
    return Plan(
        shape=shape,
        common_rows=rows,
        note=note,
        init=init,
        init_meta=init_meta,
        reference_shape=reference_shape,
        reference_path=reference_path,
        reference_meta=reference_meta,
        reference_identity=_identity(reference_path, reference_meta),
        resume=resume,
        dtype=training_dtype(recipe, device_type),
    )


def check_document_mask(recipe: Recipe) -> None:
    """Raises UserError where models would take a mask of documents for another mask, or for none."""
    if recipe.data.document_mask and recipe.model.implementation == "transformer_engine":
        raise UserError(
            "data.document_mask needs model.implementation = 'local': Transformer Engine's takes no such mask here"
        )


def _identity(path: Path | None, meta: Meta | None) -> str | None:
    """Of a converted model its origin says it all, and its checkpoint may not be written yet."""
    if path is None or meta is None:
        return None
    if meta.origin is not None:
        weights = {key: meta.origin.get(key) for key in ("format", "content", "dtype")}  # wherever the folder is
        return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:32]
    return identity(path)


def student_shape(recipe: Recipe, carried: ModelShape | None) -> ModelShape:
    """The student's shape: of its initial checkpoint, else of the preset, else as the recipe gives it."""
    if recipe.model.preset is not None:
        if carried is not None:
            check_preset(recipe.model.preset, carried)
        carried = carried or preset_shape(recipe.model.preset)
    return resolve_shape(recipe.model, carried)


def find_model(path: str, key: str, recipe: Recipe) -> tuple[Path, Meta]:
    """A checkpoint and its description; that of a Hugging Face folder is written when a model is built from it.

    key: what named the path, for messages. Raises UserError where there is none.
    """
    if is_hf_folder(path):
        return plan_conversion(path, recipe.run)
    checkpoint = resolve_checkpoint(path, key)
    return checkpoint, read_meta(checkpoint)


def _tokenizer(meta: Meta | None) -> str | None:
    """Identity of the tokenizer that a model was made with: of its datasets, or of the folder it was converted from."""
    return None if meta is None else meta.tokenizer or (meta.origin or {}).get("tokenizer")


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
        loss_head=recipe.compute.loss_head,
        loss_implementation=recipe.compute.loss_implementation,
    )
    chunks, config = build_chunks(plan.shape, recipe.parallel, build, max_sequence_length=recipe.data.sequence_length)
    if plan.init is not None:
        ensure_converted(plan.init, plan.init_meta)
        dist_checkpoint.load_model(plan.init, chunks)
    return chunks, config


def build_reference(recipe: Recipe, plan: Plan, device: torch.device, *, load: bool = False) -> Reference | None:
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
        precision=recipe.reference.precision,
    )
