"""What one rank finds: its device, its node, and the run folder as the node shows it."""

import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from launch.preflight.meeting import Place
from remit_megatron.config import Recipe

NODE_FREE_BYTES = 1 << 30


def look_at_node(recipe: Recipe, place: Place, timeout_s: float) -> tuple[torch.device | None, list[str]]:
    """This rank's device, and `node_problems`. In a thread, for what hangs there cannot be interrupted."""
    found: Future[tuple[torch.device | None, list[str]]] = Future()

    def look() -> None:
        try:
            device = _device(recipe, place)
            found.set_result((device, node_problems(device, place)))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            found.set_exception(error)

    threading.Thread(target=look, daemon=True).start()
    try:
        return found.result(timeout_s)
    except TimeoutError:
        return None, [endless(place.rank, timeout_s)]


def endless(rank: int, timeout_s: float) -> str:
    """Of a rank whose checks hang."""
    return f"rank {rank}'s checks do not end within {timeout_s:.0f} s"


def node_problems(device: torch.device | None, place: Place) -> list[str]:
    """What is wrong with this rank's device, and on a node's first rank with the node."""
    problems = []
    if device is None:
        problems.append(f"{torch.cuda.device_count()} CUDA devices for {place.ranks_per_node} ranks")
    elif device.type == "cuda":
        try:
            ones = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
            if float((ones @ ones).float().mean()) != 1024:
                problems.append(f"{device} computes wrongly")
        except RuntimeError as error:
            problems.append(f"{device}: {' '.join(str(error).split())[:200]}")
    if place.rank % place.ranks_per_node == 0:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < NODE_FREE_BYTES:
            problems.append(f"{folder} has {free / 1e6:,.0f} MB left")
    return problems


def _device(recipe: Recipe, place: Place) -> torch.device | None:
    """None: the node has fewer devices than ranks."""
    if recipe.compute.device == "cpu" or (recipe.compute.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.device_count() <= place.local_rank:
        return None
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def read_late(path: Path) -> str:
    """A file's text; "" where there is none. Network filesystems may show a new one a moment late."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return path.read_text()
        except OSError:
            time.sleep(0.2)
    return ""
