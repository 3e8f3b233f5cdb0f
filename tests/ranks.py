"""Run a function on N gloo ranks and return what each rank returned."""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What is imported by now stays. Destroying groups collects garbage, and looking at all of it takes a second a time.
    gc.freeze()
    store = dist.FileStore(f"{folder}/store", world_size)  # a file, so no port can be taken
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` gloo processes; `fn` is a module-level function, its result is picklable.

    Spawning costs seconds, so one call should carry many cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world_size, folder, fn, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
