"""One process of a run: its rank, device, process group, threads and the signals that ask it to stop."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.config import Compute
from remit_megatron.errors import HangError, LostRankError, RemitError, UserError
from remit_megatron.mcore import platform
from remit_megatron.mcore.collectives import failure_of_ranks
from remit_megatron.processes import STOP_SIGNALS

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device


@contextlib.contextmanager
def joined_process(compute: Compute) -> Iterator[Process]:
    """`start_process` for the length of a with block.

    Raises HangError or LostRankError where ranks cannot talk to each other; such an error is said by every rank. Where
    several ranks stop with another RemitError, `first_to_say` is true on one of them only, so that it is said once.
    """
    try:
        with _rank_failures():
            process = start_process(compute)
            yield process
    except (HangError, LostRankError) as error:
        error.first_to_say = True
        raise
    except RemitError as error:
        if dist.is_initialized():
            # The store may outlive the processes (an elastic agent's): a restart says its own errors.
            said = f"remit/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            error.first_to_say = dist.distributed_c10d._get_default_store().add(said, 1) == 1
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _rank_failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        failure = failure_of_ranks(error)
        if failure is None:
            raise
        raise failure from error


def start_process(compute: Compute) -> Process:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without that environment: a world of one rank. Raises UserError when the variables contradict each other.
    """
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    local_rank = _integer("LOCAL_RANK", rank)
    local_world_size = _integer("LOCAL_WORLD_SIZE", world_size)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK = {rank} is not below WORLD_SIZE = {world_size}")
    device = platform.activate(compute.device, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(compute.threads or max(1, (os.cpu_count() or 1) // local_world_size))
    alone = world_size == 1 and "MASTER_ADDR" not in os.environ
    dist.init_process_group(
        platform.backend(device),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=compute.collective_timeout_s),
        store=dist.HashStore() if alone else None,
    )
    return Process(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, device=device
    )


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and text.isascii()):
        raise UserError(f"environment variable {name} = '{text}' is no rank or size")
    return int(text)


def from_rank_0(action: Callable[[], T], device: torch.device) -> T:
    """What `action` returns on rank 0, on every rank; its RemitError is raised on every rank, so that none waits."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except RemitError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, device=device)
    if isinstance(outcome[0], RemitError):
        raise outcome[0]
    return outcome[0]


def largest_of_ranks(value: Tensor) -> float:
    """The largest of a scalar over all ranks, NaN where it is NaN on any: a maximum over ranks may drop that one.

    value: on the device that ranks talk by. Collective.
    """
    both = torch.stack([value.masked_fill(value.isnan(), -math.inf), value.isnan().to(value.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, is_nan = both.tolist()
    return math.nan if is_nan else float(largest)


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT between `__enter__` and `__exit__`; the loop asks `requested` once a step."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # A launcher may have held them back while nobody listened; what came meanwhile is noted now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
