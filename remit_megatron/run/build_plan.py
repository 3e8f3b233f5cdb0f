"""What a run will build, decided before anything is allocated: shapes, checkpoints and precision of its models."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from remit_megatron.config import Recipe
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.fit import check_models
from remit_megatron.hf.folder import is_hf_folder
from remit_megatron.hf.pairing import common_rows
from remit_megatron.objectives.needs import Need
from remit_megatron.presets import student_shape
from remit_megatron.run.checkpoint import CheckpointFolder, Meta, identity, read_meta, resolve_checkpoint
from remit_megatron.run.hf_source import plan_conversion
from remit_megatron.shape import ModelShape, check_layout

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
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
    precision: Precision
    """Of weights in training; bf16 keeps a float32 copy in the optimizer."""


def make_build_plan(recipe: Recipe, device_type: str, resume: Path | None = None) -> BuildPlan:
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
    reference_path = reference_meta = reference_shape = note = None
    rows = shape.vocab_size
    if recipe.reference is not None:
        reference_path, reference_meta = find_model(recipe.reference.path, "reference.path", recipe)
        reference_shape = reference_meta.model_shape()
        rows, note = check_pair(recipe, shape, init_meta, reference_meta)
        if reference_meta.step == 0 and reference_meta.origin is None:
            raise UserError(f"reference.path: {reference_path} was saved before its first step: it is untrained")
    check_models(recipe, shape, reference_shape, device_type=device_type)
    return BuildPlan(
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
        precision=training_precision(recipe, device_type),
    )


def check_pair(recipe: Recipe, shape: ModelShape, init: Meta | None, reference: Meta) -> tuple[int, str | None]:
    """(ids that student and reference both have a row for, what to say of the two); see `common_rows`.

    Raises UserError where they have not one tokenizer.
    """
    assert recipe.reference is not None
    return common_rows(
        (shape.vocab_size, reference.model_shape().vocab_size),
        (tokenizer_of(init), tokenizer_of(reference)),
        needs_distribution=Need.DISTRIBUTION in recipe.objective.needs,
        allow_added_tokens=recipe.reference.allow_added_tokens,
    )


def plan_checkpoint(recipe: Recipe, path: Path, device_type: str) -> BuildPlan:
    """A trained model alone, in the recipe's layout: no reference, and no run to go on with.

    Raises UserError for a layout that does not fit it.
    """
    meta = read_meta(path)
    check_layout(meta.model_shape(), recipe.parallel, "model")
    return BuildPlan(
        shape=meta.model_shape(),
        common_rows=meta.model_shape().vocab_size,
        note=None,
        init=path,
        init_meta=meta,
        reference_shape=None,
        reference_path=None,
        reference_meta=None,
        reference_identity=None,
        resume=None,
        precision=training_precision(recipe, device_type),
    )


def _identity(path: Path | None, meta: Meta | None) -> str | None:
    """Of a converted model its origin says it all, and its checkpoint may not be written yet."""
    if path is None or meta is None:
        return None
    if meta.origin is not None:
        weights = {key: meta.origin.get(key) for key in ("format", "content", "dtype")}  # wherever the folder is
        return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:32]
    return identity(path)


def find_model(path: str, key: str, recipe: Recipe) -> tuple[Path, Meta]:
    """A checkpoint and its description; that of a Hugging Face folder is written when a model is built from it.

    key: what named the path, for messages. Raises UserError where there is none.
    """
    if is_hf_folder(path):
        return plan_conversion(path, recipe.run)
    checkpoint = resolve_checkpoint(path, key)
    return checkpoint, read_meta(checkpoint, recipe.model.vocab_size)


def tokenizer_of(meta: Meta | None) -> str | None:
    """Identity of the tokenizer that a model was made with: of its datasets, or of the folder it was converted from."""
    return None if meta is None else meta.tokenizer or (meta.origin or {}).get("tokenizer")


def training_precision(recipe: Recipe, device_type: str) -> Precision:
    """What compute.precision means on a device."""
    if recipe.compute.precision == "auto":
        return "bf16" if device_type == "cuda" else "fp32"
    return recipe.compute.precision
