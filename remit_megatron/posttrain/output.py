"""What an engine made counts only when it does as the next stage's model and as a reference."""

import json
import os
import shutil
from pathlib import Path

import torch

from remit_megatron.data.files import fsync_folder, sync_file, writing
from remit_megatron.errors import UserError
from remit_megatron.hf import tokenizer
from remit_megatron.hf.folder import INDEX, HFFolder, check_tensors
from remit_megatron.hf.mapping import read_shape
from remit_megatron.posttrain.chat import put_files
from remit_megatron.shape import ModelShape

VERSIONS = "versions.json"
"""In work/: an engine's packages and their versions, if it tells them."""


def accept(made: Path, place: Path, given: Path) -> None:
    """Check a model that an engine made, and rename it to its place; one that is there already is left alone.

    given: the folder that the engine started from, whose configs and tokenizer files the model gets. Raises UserError
    naming what is wrong, with the engine's folder as it was.
    """
    if place.is_dir() and not made.is_dir():
        return
    check(made, given)
    with writing(place):
        put_files(given, made)
        names = {*HFFolder(made).shards, INDEX, "config.json", "generation_config.json", *tokenizer.FILES}
        for path in list(made.iterdir()):
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                sync_file(path)
        fsync_folder(made)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(made, place)
        fsync_folder(place.parent)


def check(made: Path, given: Path) -> None:
    """Raise UserError unless a folder holds a model like the given one, in all but the values of its weights."""
    if not (made / "config.json").is_file():
        raise UserError(f"{made}: the engine left no Hugging Face folder here")
    new, old = HFFolder(made), HFFolder(given)
    shapes = [read_shape(folder.config, folder.path / "config.json") for folder in (new, old)]
    for key in ModelShape.model_fields:
        ours, theirs = (getattr(shape, key) for shape in shapes)
        if ours != theirs:
            raise UserError(f"{made}: {key} is {ours}, and {theirs} in the model that the stage started from")
    check_tensors(new, shapes[0])
    for name, stored in new.tensors.items():
        before = old.tensors.get(name)
        if before is not None and (stored.shape, stored.dtype) != (before.shape, before.dtype):
            raise UserError(
                f"{made}: {name} is {_text(stored.shape, stored.dtype)}, and {_text(before.shape, before.dtype)} in "
                "the model that the stage started from"
            )
    _check_tokenizer(made, given)
    for name, tensor in new:
        if not torch.isfinite(tensor).all():
            raise UserError(f"{made}: {name} holds values that are not finite: the stage diverged")


def _check_tokenizer(made: Path, given: Path) -> None:
    """An engine that writes no tokenizer has not changed it."""
    if tokenizer.has_tokenizer(made) and tokenizer.has_tokenizer(given):
        difference = tokenizer.compare(given, made)
        if difference is not None:
            raise UserError(f"{made}: the engine changed the tokenizer: {difference.reasons[0]}")


def _text(shape: tuple[int, ...], dtype: str) -> str:
    return f"{list(shape)} of {dtype}"


def read_versions(work: Path) -> dict[str, str]:
    path = work / VERSIONS
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return {str(name): str(version) for name, version in content.items()}
