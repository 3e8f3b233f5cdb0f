"""From a checkpoint to a Hugging Face folder."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from remit_megatron.convert.place import already_there, check_target, claimed, finish
from remit_megatron.convert.progress import ByteProgress
from remit_megatron.convert.weights import Place, places
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import RemitError, UserError
from remit_megatron.hf import layout, tokenizer
from remit_megatron.hf.config import read_json, with_both_rope_keys
from remit_megatron.hf.folder import HFFolder, write_tensors
from remit_megatron.hf.mapping import family_of, read_shape
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import stored_dtype, whole_model
from remit_megatron.run.checkpoint import identity, read_meta, resolve_checkpoint
from remit_megatron.shape import ModelShape

MAX_SHARD_BYTES = 5_000_000_000
PROSE = ("README", "LICENSE", "NOTICE", "USE_POLICY")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".gguf")
MADE_OF = ".made_of"
"""What an export was made of. Not in the shards: two checkpoints of the same weights give the same shards."""


def export_checkpoint(
    checkpoint: str,
    target: Path,
    like: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
    allowed_keys: Collection[str] = (),
) -> bool:
    """Write a checkpoint, saved in any layout, as the new Hugging Face folder `target`; False where it was there.

    like: a folder of the same architecture, whose config, generation config and tokenizer files are taken over; its
    weights are not read. dtype: of the tensors; default: as stored. The RoPE base is the checkpoint's. allowed_keys: of
    the folder's config.json, beside those that the checkpoint was imported with. Raises UserError, and leaves nothing
    behind, when the two do not fit together, RunError where the disk refuses.
    """
    check_target(target)
    path = resolve_checkpoint(checkpoint, "CHECKPOINT")
    meta = read_meta(path)
    shape = meta.model_shape()
    config = read_json(like / "config.json")
    known = (meta.origin or {}).get("allowed_keys", "").split()
    check_alike(shape, read_shape(config, like / "config.json", {*allowed_keys, *known}), like)
    stored = stored_dtype(path)
    dtype = dtype or stored
    source = f"{identity(path)} {str(dtype).removeprefix('torch.')} {max_shard_bytes}"
    texts = _texts(like, config, shape, dtype)
    with claimed(target) as partial:
        if target.exists():
            if not _holds(target, source, texts):
                raise already_there(target)
            return False
        with whole_model(shape, stored) as model:
            dist_checkpoint.load_model(path, [model])
            found = places(model, shape)
            sizes = {name: place.part.numel() * dtype.itemsize for name, place in found.items()}
            partial.mkdir()
            with ByteProgress(f"writing {target}", sum(sizes.values()), quiet) as progress:
                write_tensors(partial, _tensors(found, dtype, progress), sizes, max_shard_bytes)
            for name, content in {**texts, MADE_OF: source.encode()}.items():
                write_atomically(partial / name, content)
            finish(partial, target)
    return True


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


def left_behind(like: Path) -> list[str]:
    """What an export does not take from `like`: neither weights, prose nor hidden."""
    taken = {"config.json", "generation_config.json", *tokenizer.FILES}
    rest = (path for path in like.iterdir() if path.name not in taken and not path.name.startswith((".", *PROSE)))
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in rest if not path.name.endswith(WEIGHTS))


def _texts(like: Path, config: dict[str, Any], shape: ModelShape, dtype: torch.dtype) -> dict[str, bytes]:
    """The files of an export that hold no weights, by name."""
    config = {**with_both_rope_keys(config, shape.rope_theta), "model_type": family_of(shape).name}
    config.pop("auto_map", None)  # it names code, which a folder written here does not hold
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 writes the first, and reads both
    config[key] = str(dtype).removeprefix("torch.")
    names = [name for name in ("generation_config.json", *tokenizer.FILES) if (like / name).is_file()]
    copied = {name: (like / name).read_bytes() for name in names}
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **copied}


def _holds(target: Path, source: str, texts: dict[str, bytes]) -> bool:
    """Whether a folder is this very export, whole."""
    try:
        HFFolder(target)
        return all((target / name).read_bytes() == text for name, text in {**texts, MADE_OF: source.encode()}.items())
    except (RemitError, OSError):
        return False
