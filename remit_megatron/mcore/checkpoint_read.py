"""Reading a distributed checkpoint without trust: checksums first, and no pickle in it can run code.

Megatron and torch keep a pickle in .metadata, one in common.pt or (from 0.19 on) among the objects beside the tensors,
and one for each other object. Here an unpickler with a list of allowed names reads the first, and torch's restricted
one the others. Every supported version's checkpoints are read by every other.
"""

import contextlib
import io
import os
import pathlib
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from remit_megatron.data import checksums
from remit_megatron.errors import DamagedError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # An asynchronous save keeps the plans of all ranks.
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
"""What .metadata is made of: names of classes, and two functions that look a constant up."""


def _member(of: Any, name: str) -> Any:
    """In place of getattr, by which some versions of Python, such as 3.11.2, pickle the member of an enumeration."""
    if of not in (_MEM_FORMAT_ENCODING, WriteItemType):
        raise pickle.UnpicklingError("it asks for an attribute, which no checkpoint needs")
    return of[name]


ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variable by which torch unpickles whatever it is given."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        # Python 3.13 writes paths under a module that no other version has.
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)


class Reader(dcp.FileSystemReader):
    """torch's reader of shards, with a .metadata that cannot run code; it is read once."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamagedError naming the file for one that holds anything else than a description."""
        if self._known is None:
            path = Path(self.path) / ".metadata"
            try:
                with path.open("rb") as stream:
                    metadata = _Unpickler(stream).load()
            except (pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, AttributeError) as error:
                raise DamagedError(f"{path}: refused: {error}") from None
            except (ImportError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
                raise DamagedError(f"{path}: refused: {type(error).__name__}: {error}") from None
            if not isinstance(metadata, Metadata):
                raise DamagedError(f"{path}: refused: it holds no description of a checkpoint")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._check_paths(metadata)
            self._known = metadata
        return self._known

    def _check_paths(self, metadata: Metadata) -> None:
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise DamagedError(f"{self.path}/.metadata: refused: it names a file elsewhere, {info.relative_path}")


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedError(f"its object {name} is refused: {_unsafe(error)}") from None
        # Transformer Engine would unpickle what is in it; the layers trained here leave it empty.
        if "_extra_state" in name and _has_bytes(loaded):
            raise DamagedError(f"its object {name} is refused: it holds a pickle for Transformer Engine")
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def _planner(tensors: list[ShardedTensor]) -> _Planner:
    return _Planner(
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
    )


def _has_bytes(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(_has_bytes(item) for item in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    return bool(value.getvalue() if isinstance(value, io.BytesIO) else value)


COMMON_OBJECT = "common_state/shard_0_1"
"""Where Megatron-Core 0.19 keeps what earlier ones write into common.pt: an object beside the tensors."""


def read_common_object(checkpoint: Path) -> Any:
    """What ranks have in common, of a checkpoint without common.pt. Raises DamagedError where it is not there."""
    reader = Reader(checkpoint)
    if COMMON_OBJECT not in reader.read_metadata().state_dict_metadata:
        raise DamagedError(f"{checkpoint}: neither {common.COMMON_STATE_FNAME} nor an object {COMMON_OBJECT} in it")
    state: dict[str, Any] = {COMMON_OBJECT: io.BytesIO()}
    dcp.load(state, storage_reader=reader, planner=_planner([]), no_dist=True)
    (content,) = state[COMMON_OBJECT]
    return content


_Strategy: Any = getattr(common, "TorchCommonLoadStrategy", object)


class LoadCommon(_Strategy):
    """What ranks have in common through torch's restricted unpickler, whatever the environment asks torch for."""

    def load_common(self, checkpoint_dir: Any) -> Any:
        path = Path(checkpoint_dir) / common.COMMON_STATE_FNAME
        if not path.exists():
            return read_common_object(Path(checkpoint_dir))
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedError(f"{path}: refused: {_unsafe(error)}") from None
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise DamagedError(f"{path}: refused: {first_line(error)}") from None


def _unsafe(error: pickle.UnpicklingError) -> str:
    """torch's own message recommends to trust the file."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it names {found[1]}, which no checkpoint needs" if found else "it holds more than tensors and plain values"


class LoadSharded(TorchDistLoadShardedStrategy):
    """Megatron's own way to load, with the reader and the planner above."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, *newer: Any) -> Any:
        tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
        original = sharded_state_dict
        sharded, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(sharded, True)
        reader = Reader(checkpoint_dir)
        reader.read_metadata()  # here, because torch takes a refusal for a file that is not there
        dcp.load_state_dict(
            state,
            reader,
            planner=_planner(tensors),
        )
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
        _restore_dict_types(loaded, original)
        return loaded


@contextlib.contextmanager
def distrusting(folder: Path) -> Iterator[list[Any]]:
    """Yields the strategies for dist_checkpointing.load inside which no pickle of the checkpoint runs code.

    From 0.17 on Megatron-Core loads what ranks have in common by functions of its own: torch is told to use its
    restricted unpickler in all of them.
    """
    Reader(folder).read_metadata()
    if "pathlib._local" not in sys.modules and sys.version_info < (3, 13):
        sys.modules["pathlib._local"] = pathlib  # for torch's own reader, which Megatron-Core 0.19 asks
    before = {name: os.environ.pop(name, None) for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", ANYTHING)}
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield [LoadSharded(), *([LoadCommon()] if hasattr(common, "TorchCommonLoadStrategy") else [])]
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def cause(error: BaseException) -> BaseException:
    """Of a torch checkpoint error, what failed on the first of its ranks; else the error itself."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def first_line(error: BaseException) -> str:
    """Of what the cause of an error says."""
    error = cause(error)
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def verify(folder: Path) -> None:
    """Compare every file with the folder's manifest, each on one of the ranks. Collective.

    Raises DamagedError on every rank, naming the files.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _problems_of_rank(folder))
    problems = [problem for of_rank in found for problem in of_rank]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedError(f"checkpoint {folder}: {'; '.join(problems[:3])}{more}")


def _problems_of_rank(folder: Path) -> list[str]:
    if not (folder / "meta.json").exists() and not (folder / checksums.NAME).exists():
        if dist.get_rank() == 0:
            print(
                f"remit: {folder} is Megatron-LM's and has no checksums: `remit convert adopt` gives it some",
                file=sys.stderr,
                flush=True,
            )
        return []
    try:
        files = checksums.read(folder)
    except DamagedError as error:
        return [str(error)] if dist.get_rank() == 0 else []
    # The largest first, so that they spread over the ranks.
    names = sorted(files, key=lambda name: -files[name].bytes)[dist.get_rank() :: dist.get_world_size()]
    return checksums.problems(folder, {name: files[name] for name in names}, content=True)
