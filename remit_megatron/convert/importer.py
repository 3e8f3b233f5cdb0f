"""From a Hugging Face folder to a checkpoint that any layout loads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from remit_megatron.convert.place import already_there, check_target, claimed, finish
from remit_megatron.convert.progress import ByteProgress
from remit_megatron.convert.weights import fill, places
from remit_megatron.errors import RemitError
from remit_megatron.hf.folder import HFFolder, check_tensors, choose_dtype
from remit_megatron.hf.mapping import read_fields
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import whole_model
from remit_megatron.run.checkpoint import Meta, read_meta, write_meta
from remit_megatron.run.hf_source import origin
from remit_megatron.shape import ModelShape


def import_folder(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
    allowed_keys: Collection[str] = (),
) -> str:
    """Convert the weights of `source` into the new folder `target`, bit for bit unless `dtype` asks for a cast.

    Returns what the weights are now, and whether they were rounded; a target that holds this very conversion is left
    as it is. allowed_keys: of config.json, which the user answers for; the checkpoint records those that counted.

    The checkpoint records its origin, so that it may serve as a reference. Memory: the model and one tensor. The
    process must not use another device than the CPU. Raises UserError, and leaves nothing behind, for whatever in the
    folder does not fit, a number that is not finite included.
    """
    check_target(target)
    folder = HFFolder(source)
    shape, fields = read_fields(folder.config, source / "config.json", allowed_keys)
    check_tensors(folder, shape)
    name = choose_dtype(folder, None if dtype is None else str(dtype).removeprefix("torch."))
    rounded = name == "bfloat16" and folder.dtypes() != {"bfloat16"}
    kind = name + (", rounded as asked" if rounded else "")
    allowed = fields.allowed_keys()
    made_of = origin(folder, folder.content_key(), name) | ({"allowed_keys": " ".join(allowed)} if allowed else {})
    with claimed(target) as partial:
        if target.exists():
            if not _holds(target, shape, made_of):
                raise already_there(target)
            return f"{kind}; it was there already"
        with whole_model(shape, getattr(torch, name)) as model:
            _fill(model, shape, folder, quiet)
            partial.mkdir()
            dist_checkpoint.save(partial, [model], None)
        precision = "bf16" if name == "bfloat16" else "fp32"
        write_meta(partial, Meta(shape=shape.model_dump(), precision=precision, origin=made_of))
        finish(partial, target)
    return kind


def _fill(model: Any, shape: ModelShape, folder: HFFolder, quiet: bool) -> None:
    with ByteProgress(f"reading {folder.path}", sum(_bytes(folder)), quiet) as progress:
        for done in fill(places(model, shape), folder):
            progress.update(done)


def _holds(target: Path, shape: ModelShape, wanted: dict[str, str]) -> bool:
    """Whether a folder is a checkpoint with this shape, content and type, wherever it was converted from."""
    try:
        meta = read_meta(target)
    except RemitError:
        return False
    known = meta.origin or {}
    return (
        meta.step == 0
        and meta.shape == shape.model_dump()
        and all(known.get(key) == wanted[key] for key in ("format", "content", "dtype"))
    )


def _bytes(folder: HFFolder) -> list[int]:
    sizes = []
    for stored in folder.tensors.values():
        count = getattr(torch, stored.dtype).itemsize
        for side in stored.shape:
            count *= side
        sizes.append(count)
    return sizes
