"""From a checkpoint to a Hugging Face folder."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from remit_megatron.convert.progress import ByteProgress
from remit_megatron.convert.weights import Place, places
from remit_megatron.errors import UserError
from remit_megatron.hf import layout, tokenizer
from remit_megatron.hf.config import read_json, with_both_rope_keys
from remit_megatron.hf.families import family_of, read_shape
from remit_megatron.hf.folder import write_tensors
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import stored_dtype, whole_model
from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint
from remit_megatron.shape import ModelShape

MAX_SHARD_BYTES = 5_000_000_000


def export_checkpoint(
    checkpoint: str,
    target: Path,
    like: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> None:
    """Write a checkpoint, saved in any layout, as the new Hugging Face folder `target`.

    like: a folder of the same architecture, whose config, generation config and tokenizer files are taken over; its
    weights are not read. dtype: of the tensors; default: as stored. The RoPE base is the checkpoint's. Raises
    UserError, and leaves nothing behind, when the two do not fit together.
    """
    path = resolve_checkpoint(checkpoint, "CHECKPOINT")
    shape = read_meta(path).model_shape()
    config = read_json(like / "config.json")
    check_alike(shape, read_shape(config, like / "config.json"), like)
    if target.exists():
        raise UserError(f"{target}: exists already: name a new folder, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: is no folder: make it first")
    stored = stored_dtype(path)
    dtype = dtype or stored
    with whole_model(shape, stored) as model:
        dist_checkpoint.load_model(path, [model])
        found = places(model, shape)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            sizes = {name: place.part.numel() * dtype.itemsize for name, place in found.items()}
            with ByteProgress(f"writing {target}", sum(sizes.values()), quiet) as progress:
                write_tensors(partial, _tensors(found, dtype, progress), sizes, max_shard_bytes)
            _write_config(partial, like, config, shape, dtype)
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_alike(shape: ModelShape, other: ModelShape, like: Path) -> None:
    """Raise UserError naming the first key in which a config differs from a checkpoint; the RoPE base may."""
    if family_of(shape) is not family_of(other):
        raise UserError(f"{like}: is a {other.family} model, the checkpoint is a {shape.family} model")
    for key in ModelShape.model_fields:
        if key not in ("family", "rope_theta") and getattr(shape, key) != getattr(other, key):
            raise UserError(
                f"{like}: {key} = {getattr(other, key)}, the checkpoint has {getattr(shape, key)}: name a folder of "
                "the same architecture"
            )


def _tensors(found: dict[str, Place], dtype: torch.dtype, progress: ByteProgress) -> Iterator[tuple[str, torch.Tensor]]:
    done = 0
    for name, place in found.items():
        tensor = layout.read_part(place.part, place.ndim).to(dtype)
        done += tensor.nbytes
        progress.update(done)
        yield name, tensor


def _write_config(folder: Path, like: Path, config: dict[str, Any], shape: ModelShape, dtype: torch.dtype) -> None:
    config = {**with_both_rope_keys(config, shape.rope_theta), "model_type": family_of(shape).name}
    config.pop("auto_map", None)  # it names code, which a folder written here does not hold
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 writes the first, and reads both
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("generation_config.json", *tokenizer.FILES):
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
