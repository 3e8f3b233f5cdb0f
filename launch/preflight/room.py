"""Room for the next checkpoints in the run folder."""

import os
from pathlib import Path

from remit_megatron.config import Recipe
from remit_megatron.errors import RemitError, RunError
from remit_megatron.hf.config import read_json
from remit_megatron.hf.folder import is_hf_folder
from remit_megatron.hf.mapping import read_shape
from remit_megatron.presets import preset_shape
from remit_megatron.run.checkpoint import BYTES_PER_PARAMETER, CheckpointFolder, read_meta, resolve_checkpoint
from remit_megatron.shape import resolve_shape

CHECKPOINTS_FREE = 2.2
"""Room for so many: one is written before the oldest goes, and metrics and logs want some."""
FILES_PER_RANK = 8


def room_problem(recipe: Recipe, run: Path, ranks: int) -> str | None:
    """What the run folder lacks for a run of so many ranks, in one line."""
    try:
        to_keep = recipe.kept_checkpoints - len(CheckpointFolder(run / "checkpoints", keep=1).kept())
        count = CHECKPOINTS_FREE + max(0, to_keep)
        check_room(run, checkpoint_bytes(recipe, run), FILES_PER_RANK * ranks, count)
    except RemitError as error:
        return str(error)
    return None


def checkpoint_bytes(recipe: Recipe, run: Path) -> int:
    """Size of the next checkpoint: of the largest one there, else from the model's parameters."""
    # Whether the pointer is right, and what to do if it is not, is for the trainer to say.
    folder = CheckpointFolder(run / "checkpoints", keep=1)
    named = folder.named()
    there = [path for path in ([named, *folder.before(named)] if named else []) if path.is_dir()]
    if there:
        return max(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in there)
    carried = None
    if recipe.model.init and is_hf_folder(recipe.model.init):
        path = Path(recipe.model.init) / "config.json"
        carried = read_shape(read_json(path), str(path))
    elif recipe.model.init:
        checkpoint = resolve_checkpoint(recipe.model.init, "model.init")
        carried = read_meta(checkpoint, recipe.model.vocab_size).model_shape()
    elif recipe.model.preset:
        carried = preset_shape(recipe.model.preset)
    return resolve_shape(recipe.model, carried).num_parameters() * BYTES_PER_PARAMETER


def check_room(run: Path, needed_bytes: int, needed_files: int, count: float = CHECKPOINTS_FREE) -> None:
    """Raise RunError where the run folder's filesystem lacks space or inodes for so many more checkpoints."""
    status = os.statvfs(run)
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    wanted, wanted_files = count * needed_bytes, count * needed_files
    if free < wanted:
        raise RunError(
            f"{run}: {free / 1e9:,.1f} GB are free, and {count} checkpoints of {needed_bytes / 1e9:,.1f} GB "
            f"need {wanted / 1e9:,.1f}: free space there"
        )
    # Some filesystems make inodes as they need them, and count none.
    if status.f_files and files < wanted_files:
        raise RunError(f"{run}: {files:,} inodes are free, and {wanted_files:,.0f} are needed: remove files there")
