"""Megatron-LM's checkpoints: where the newest one is, and what its arguments say. Nothing in them runs code.

FOLDER/latest_checkpointed_iteration.txt   the tracker: a number, or `release`
FOLDER/iter_0000020/                       Megatron's distributed checkpoint; common.pt has the arguments
"""

import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remit_megatron.errors import DamagedError, UserError
from remit_megatron.mcore.megatron_lm.shapes import arguments_of
from remit_megatron.outside import quote, read_object
from remit_megatron.shape import ModelShape

FLAG = "--remit-reference"
TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
MAX_BYTES = 64 << 20
"""Of what ranks have in common, tensors left out."""
ORIGIN = "megatron-lm"
"""What meta.json names as the format that a checkpoint came in."""
METADATA = ".metadata"
HF = "is a Hugging Face folder: make a checkpoint of it by `remit convert import`"
BRIDGE = (
    "is a checkpoint of Megatron-Bridge, which keeps its shape in run_config.yaml: export it to a Hugging Face folder "
    "by its AutoBridge"
)
OLD = (
    "is in Megatron-LM's old format (--ckpt-format torch): let Megatron-LM load it and save it by "
    "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER"
)


def is_megatron_lm(path: Path) -> bool:
    """Whether a folder is one that Megatron-LM saves into, or a checkpoint in it, and not this package's."""
    if (path / "meta.json").exists():
        return False
    return (path / TRACKER).exists() or _is_old(path) or (path / METADATA).exists()


def resolve(path: Path, key: str) -> Path:
    """A checkpoint's own folder; of one that Megatron-LM saves into, its newest. Raises UserError naming the path."""
    if (path / TRACKER).exists():
        name = (path / TRACKER).read_text(errors="replace").strip()
        if not re.fullmatch(r"\d{1,12}|release", name):
            raise UserError(f"{key} {path}: {TRACKER} names no iteration but {quote(name)}")
        found = path / (name if name == "release" else f"iter_{int(name):07d}")
        if not found.is_dir():
            raise UserError(f"{key} {path}: {TRACKER} names {found.name}, which is not there")
        path = found
    if not path.is_dir():
        raise UserError(f"{key} {path}: is no folder")
    if (path / "meta.json").exists():
        return path
    if (path / "config.json").exists():
        raise UserError(f"{key} {path}: {HF}")
    if _is_old(path):
        raise UserError(f"{key} {path}: {OLD}")
    if (path / "run_config.yaml").exists():
        raise UserError(f"{key} {path}: {BRIDGE}")
    if not (path / METADATA).exists():
        raise UserError(f"{key} {path}: is no checkpoint: it has no {METADATA}, and there is no {TRACKER}")
    return path


def _is_old(path: Path) -> bool:
    return any(path.glob("mp_rank_*")) or any(path.glob("iter_*/mp_rank_*"))


def is_foreign(folder: Path) -> bool:
    """Whether Megatron-LM wrote a checkpoint, with a manifest of this package or without."""
    if not (folder / "meta.json").exists():
        return True
    return ((read_object(folder / "meta.json").get("origin") or {}).get("format")) == ORIGIN


def saved_arguments(folder: Path) -> Namespace:
    """Megatron-LM's arguments in one of its checkpoints. Raises UserError where it has none."""
    arguments = _common_state(folder).get("args")
    if not isinstance(arguments, Namespace):
        raise UserError(f"{folder}: it has no arguments of Megatron-LM, which say what its shape is")
    return arguments


class _Inert:
    """In place of whatever a pickle names: takes what it is given, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Arguments that a pickle gives are dropped."""

    def _ignore(self, *args: Any) -> None:
        """State and items that a pickle gives are dropped."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Plain(pickle.Unpickler):
    """Plain values and the arguments as they are; a class, a function or a tensor stays closed."""

    def find_class(self, module: str, name: str) -> Any:
        kinds: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): Namespace,
            ("collections", "OrderedDict"): OrderedDict,
        }
        return kinds.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def _common_state(folder: Path) -> dict[str, Any]:
    """What all ranks have in common, tensors left out; torch is not needed, and nothing of another version either."""
    path = folder / COMMON
    if not path.exists():
        from remit_megatron.mcore.checkpoint_read import LoadCommon  # 0.19 keeps it among the tensors

        return dict(LoadCommon().load_common(folder))
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [one for one in archive.namelist() if Path(one).name == "data.pkl"]
            if archive.getinfo(name).file_size > MAX_BYTES:
                raise ValueError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
            with archive.open(name) as stream:
                found = _Plain(stream).load()
        if not isinstance(found, dict):
            raise ValueError("it is no dictionary")
        return found
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{path}: cannot be read: {error}") from None
    except (pickle.UnpicklingError, IndexError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None


def read_arguments(folder: Path) -> dict[str, Any]:
    """Arguments that say the shape of a checkpoint of Megatron-LM or of this package."""
    if not (folder / "meta.json").exists():
        return vars(saved_arguments(folder))
    try:
        shape = ModelShape(**read_object(folder / "meta.json")["shape"])
    except (ValidationError, KeyError, TypeError):
        raise DamagedError(f"{folder}: meta.json describes no model") from None
    return arguments_of(shape, folder)
