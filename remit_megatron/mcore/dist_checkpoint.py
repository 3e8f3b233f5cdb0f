"""Megatron distributed checkpoints of a model and its optimizer: any layout writes, any layout reads.

Folders and their commit protocol are the caller's (remit_megatron/run/checkpoint.py).
"""

import contextlib
import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from remit_megatron.data import checksums
from remit_megatron.data.files import sync_file, write_atomically
from remit_megatron.errors import DamagedError, RunError, UserError
from remit_megatron.mcore import compat
from remit_megatron.mcore.checkpoint_read import Reader, cause, distrusting, first_line, verify
from remit_megatron.mcore.collectives import failure_of_ranks
from remit_megatron.mcore.loss_hook import unwrap
from remit_megatron.mcore.megatron_lm.checkpoint import is_foreign
from remit_megatron.processes import die_with_parent

# Each optimizer state is stored under its parameter in the model's own shape, so that any layout can read it.
# Gathered on one data-parallel rank over gloo: otherwise every rank of a node would hold all of its states at once.
# Passed as a copy: Megatron adds process groups to it.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


WRITERS = max(2, min(8, (os.cpu_count() or 2) // 2))
"""Threads, and so files, of a rank that saves: as many are hashed at a time."""


FULL_BELOW_BYTES = 1 << 20
WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")
"""How names of a model's own tensors begin."""


class _ThreadedSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format through torch's own writer, in threads.

    Megatron's writer starts a manager process and forks for every save; beside gloo's threads a fork may deadlock,
    and the start costs seconds a rank. The files are the same.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(
            mcore_to_pyt_state_dict(sharded, False),
            storage_writer=dcp.FileSystemWriter(
                checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=WRITERS
            ),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def model_state(chunks: list[Any]) -> dict[str, Any]:
    """Sharded state of a rank's model chunks. Layers are named by their number in the whole model."""
    return {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(chunks)}


def _training_state(chunks: list[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    state = model_state(chunks)
    compat.align_optimizer_state(optimizer)
    compat.make_loadable(optimizer)
    optimizer_state = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=dict(METADATA))
    return {**state, "optimizer": optimizer_state}


def save(folder: Path, chunks: list[Any], optimizer: Any | None) -> None:
    """Write into an existing, empty folder, with a manifest; returns when all ranks have written. Collective.

    Raises RunError where a rank cannot write.
    """
    with _writing(folder), _silent_threads():
        dist_checkpointing.save(
            _state(chunks, optimizer), folder, _ThreadedSave("torch_dist", 1), content_metadata=METADATA
        )
        _write_manifest(folder, _sums(folder, dist.get_rank()))


def _sums(folder: Path, rank: int) -> dict[str, checksums.Checksum] | None:
    """Of the shards that a rank wrote; None where they cannot be read: the other ranks wait for an answer."""
    try:
        return checksums.of_files(_own_shards(folder, rank))
    except OSError:
        return None


def _own_shards(folder: Path, rank: int) -> list[Path]:
    return sorted(folder.glob(f"__{rank}_*.distcp"))


def _write_manifest(folder: Path, shards: dict[str, checksums.Checksum] | None) -> None:
    """The manifest of everything in the folder; each rank brings its own shards. Collective.

    Raises RunError on every rank where one brings None, or rank 0 cannot write.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shards)
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            others = [path for path in folder.iterdir() if path.suffix != ".distcp"]
            for path in others:
                sync_file(path)  # Megatron syncs the shards only
            if None in gathered:
                raise RunError(f"rank {gathered.index(None)} cannot read what it wrote")
            known = {name: checksum for of_rank in gathered for name, checksum in of_rank.items()}
            checksums.write(folder, {**known, **checksums.of_files(others)})
        except (OSError, RunError) as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, device=_object_device())
    if outcome[0] is not None:
        raise RunError(f"checkpoint {folder} cannot be written: {outcome[0]}; the newest complete one stays as it was")


def _object_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _write_and_hash(write: Callable[..., None], folder: Path, rank: int, *arguments: Any, **more: Any) -> None:
    """In the writing process: what it wrote is hashed there as well, and the sums left for its parent."""
    write(*arguments, **more)
    sums = {name: asdict(value) for name, value in checksums.of_files(_own_shards(folder, rank)).items()}
    write_atomically(_sums_file(folder, rank), json.dumps(sums).encode())


def _sums_file(folder: Path, rank: int) -> Path:
    return folder / f".sums-{rank}.json"


def _take_sums(folder: Path, rank: int) -> dict[str, checksums.Checksum] | None:
    """What `_write_and_hash` left, which goes; nothing where this rank had nothing to write. None: it is not there."""
    path = _sums_file(folder, rank)
    try:
        sums = json.loads(path.read_text())
        path.unlink()
    except OSError:
        return None if _own_shards(folder, rank) else {}
    return {name: checksums.Checksum(**value) for name, value in sums.items()}


class BackgroundSave:
    """Megatron's asynchronous writer: tensors are copied, a child process writes them while training goes on."""

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._folder = Path()
        # A child must not outlive its parent: it would go on writing beside the process that takes over.
        os.register_at_fork(after_in_child=die_with_parent)
        compat.keep_results_with_rank()

    def start(self, folder: Path, chunks: list[Any], optimizer: Any | None, commit: Callable[[], None]) -> None:
        """Begin to write into an existing, empty folder; `commit` runs on every rank once all ranks have written."""
        self.wait()
        self._folder = folder
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        request = dist_checkpointing.save(
            _state(chunks, optimizer),
            folder,
            strategy,
            async_sharded_save=True,
            content_metadata=METADATA,
            **compat.own_writer(dist_checkpointing.save),
        )
        rank = dist.get_rank()
        if request.async_fn is not None:
            request = request._replace(async_fn=functools.partial(_write_and_hash, request.async_fn, folder, rank))

        def finish() -> None:
            _write_manifest(folder, _take_sums(folder, rank))
            commit()

        request.add_finalize_fn(finish)
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Commit what is written on all ranks. Collective, once a step."""
        with _writing(self._folder):
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Commit what is under way, when all ranks have written it. Collective."""
        with _writing(self._folder):
            self._queue.maybe_finalize_async_calls(blocking=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the writers raise where a disk is full or gone into one RunError."""
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        if failure_of_ranks(error):
            raise
        raise RunError(
            f"checkpoint {folder} cannot be written: {_why_not(error, folder)}; the newest complete one stays as it was"
        ) from error


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """What a writer's thread raises comes back as the error of the save; Python would print its traceback besides."""
    before = threading.excepthook
    threading.excepthook = lambda arguments: None
    try:
        yield
    finally:
        threading.excepthook = before


def _why_not(error: BaseException, folder: Path) -> str:
    """torch's writer, when its disk is full, speaks of a position in its archive."""
    with contextlib.suppress(OSError):
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < FULL_BELOW_BYTES and "No space left" not in first_line(error):
            return f"No space left on device, free some there ({first_line(error)})"
    return first_line(error)


def _state(chunks: list[Any], optimizer: Any | None) -> dict[str, Any]:
    return model_state(chunks) if optimizer is None else _training_state(chunks, optimizer, is_loading=False)


def load_model(folder: Path, chunks: list[Any]) -> None:
    """Load weights only. Collective. Raises UserError naming the folder when a tensor is absent or unreadable."""
    state = model_state(chunks)
    names = {value.key for value in nested_values(state) if hasattr(value, "key")}
    loaded = _load(state, folder)
    if is_foreign(folder):
        _check_all_read(names, folder)
    _restore_model(loaded, chunks)


def _check_all_read(names: set[str], folder: Path) -> None:
    """Raises UserError where a checkpoint of Megatron-LM has weights that the model does not take. Collective.

    names: of the weights that this rank has taken.
    """
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, names)
    stored = {name.split("/shard_")[0] for name in Reader(folder).read_metadata().state_dict_metadata}
    weights = {name for name in stored if name.startswith(WEIGHTS) and not name.endswith("_extra_state")}
    if left := sorted(weights.difference(*taken)):
        raise UserError(
            f"checkpoint {folder}: it has weights that the model its arguments describe does not take: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
        )


def load_training(folder: Path, chunks: list[Any], optimizer: Any) -> None:
    """Load weights and optimizer. Collective.

    Raises RunError where the optimizer's own weights are not the model's: its states then belong to other parameters;
    UserError where its groups of parameters are not this optimizer's.
    """
    loaded = _load(_training_state(chunks, optimizer, is_loading=True), folder)
    _restore_model(loaded, chunks)
    of_model = weights_checksum(chunks)
    try:
        optimizer.load_state_dict(loaded["optimizer"])
    except (KeyError, ValueError) as error:  # up to 0.18 a group is told by other names than later
        raise UserError(
            f"checkpoint {folder}: its optimizer has other groups than this one's, as changed learning rates or decay "
            f"make them ({first_line(error)}); go on with the settings that wrote it, or start another run from its "
            "weights with model.init"
        ) from error
    compat.separate_steps(optimizer)
    compat.write_master_weights(chunks, optimizer)
    differs = torch.tensor([int(weights_checksum(chunks) != of_model)], device=_object_device())
    dist.all_reduce(differs)
    if differs.item():
        raise RunError(
            f"checkpoint {folder}: the optimizer's weights are not the model's: this version of Megatron-Core cannot "
            "bring its optimizer states from the layout that wrote them into this one; go on in the layout that wrote "
            "them, or start another run from these weights with model.init"
        )


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Raises DamagedError naming a file that is not what the manifest says, or that holds code."""
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    verify(folder)
    try:
        with distrusting(folder) as strategies:
            return dist_checkpointing.load(state, folder, *strategies)
    except DamagedError:
        raise
    except (
        CheckpointingException,
        CheckpointException,
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
    ) as error:
        if failure_of_ranks(error):
            raise
        kind = DamagedError if isinstance(cause(error), DamagedError) else UserError
        raise kind(f"checkpoint {folder}: cannot be loaded: {first_line(error)}") from error


def _restore_model(loaded: dict[str, Any], chunks: list[Any]) -> None:
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{i}"])


@torch.no_grad()
def weights_checksum(chunks: list[Any]) -> int:
    """Sum of the bit patterns of this rank's weights: changes when any bit does, costs one read of the weights."""
    total = 0
    for chunk in chunks:
        for parameter in unwrap(chunk).parameters():
            bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
            total += int(bits.sum(dtype=torch.int64))
    return total


@torch.no_grad()
def unchanged_matrices(chunks: list[Any], before: list[torch.Tensor]) -> list[str]:
    """Names of matrices whose first row still equals the one taken `before` loading: they were never loaded."""
    rows = iter(before)
    return [
        name
        for chunk in chunks
        for name, parameter in unwrap(chunk).named_parameters()
        if parameter.ndim > 1 and torch.equal(parameter[0], next(rows))
    ]


@torch.no_grad()
def first_rows(chunks: list[Any]) -> list[torch.Tensor]:
    """A copy of the first row of each matrix, for `unchanged_matrices`."""
    return [p[0].clone() for chunk in chunks for p in unwrap(chunk).parameters() if p.ndim > 1]
