"""From a Hugging Face folder to a checkpoint that any layout loads."""

import shutil
import tempfile
from pathlib import Path

import torch

from remit_megatron.convert.progress import ByteProgress
from remit_megatron.convert.weights import check_tensors, fill, places
from remit_megatron.errors import UserError
from remit_megatron.hf.families import read_shape
from remit_megatron.hf.folder import HFFolder, choose_dtype
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import whole_model
from remit_megatron.run.checkpoint import Meta, write_meta
from remit_megatron.run.hf_source import origin


def import_folder(source: Path, target: Path, dtype: torch.dtype | None = None, quiet: bool = False) -> str:
    """Convert the weights of `source` into the new folder `target`, bit for bit unless `dtype` asks for a cast.

    Returns what the weights are now, and whether they were rounded.

    The checkpoint records its origin, so that it may serve as a reference. Memory: the model and one tensor. The
    process must not use another device than the CPU. Raises UserError, and leaves nothing behind, for whatever in the
    folder does not fit.
    """
    if target.exists():
        raise UserError(f"{target}: exists already: name a new folder, or remove it")
    folder = HFFolder(source)
    shape = read_shape(folder.config, source / "config.json")
    name = choose_dtype(folder, None if dtype is None else str(dtype).removeprefix("torch."))
    dtype = getattr(torch, name)
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: is no folder: make it first")
    with whole_model(shape, dtype) as model:
        wanted = places(model, shape)
        check_tensors(folder, wanted, shape)
        with ByteProgress(f"reading {source}", sum(_bytes(folder)), quiet) as progress:
            for done in fill(wanted, folder):
                progress.update(done)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            dist_checkpoint.save(partial, [model], None)
            meta = Meta(
                shape=shape.model_dump(),
                precision="bf16" if dtype is torch.bfloat16 else "fp32",
                origin=origin(folder, folder.content_key(), name),
            )
            write_meta(partial, meta)
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    rounded = name == "bfloat16" and folder.dtypes() != {"bfloat16"}
    return name + (", rounded as asked" if rounded else "")


def _bytes(folder: HFFolder) -> list[int]:
    sizes = []
    for stored in folder.tensors.values():
        count = getattr(torch, stored.dtype).itemsize
        for side in stored.shape:
            count *= side
        sizes.append(count)
    return sizes
