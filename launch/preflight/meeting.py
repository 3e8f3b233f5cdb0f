"""The ranks of a preflight, and the store through which they tell each other what they find."""

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from remit_megatron.errors import PreflightError

POLL_S = 0.01
TOLD_S = 10.0
"""How long rank 0 waits for the others to read what it tells them."""
UNKNOWN = "unknown"
"""In place of a node, for a fault that none can be blamed for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank is."""

    rank: int
    world_size: int
    ranks_per_node: int
    local_rank: int
    nodes: tuple[str, ...]

    def node_of(self, rank: int) -> str:
        number = rank // self.ranks_per_node
        return self.nodes[number] if number < len(self.nodes) else f"node {number}"


class BadNodes(PreflightError):
    """Nodes by name, with what is wrong. UNKNOWN stands for a fault that no node can be blamed for."""

    def __init__(self, nodes: dict[str, str]):
        super().__init__("; ".join(f"{node}: {problem}" for node, problem in nodes.items()))
        self.names = [node for node in nodes if node != UNKNOWN]


def connect(place: Place, serve: bool, timeout_s: float) -> dist.TCPStore:
    """Raises PreflightError where the first node does not answer."""
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]) + 1,  # the next port is training's
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, OSError) as error:
        raise PreflightError(f"{place.node_of(place.rank)} cannot reach {place.nodes[0]}: {error}") from None


def tell(store: dist.Store, place: Place, name: str, content: Any) -> None:
    """On rank 0, which serves the store: to every rank, and wait until those that report have read it."""
    store.set(name, json.dumps(content))
    others = [rank for rank in range(1, place.world_size) if store.check([f"report/{rank}"])]
    deadline = time.monotonic() + TOLD_S
    while others and time.monotonic() < deadline:
        others = [rank for rank in others if not store.check([f"{name}/{rank}"])]
        time.sleep(POLL_S)


def told(store: dist.Store, place: Place, name: str) -> Any:
    """On the other ranks. Raises PreflightError where rank 0 has gone."""
    try:
        content = json.loads(store.get(name))
        store.set(f"{name}/{place.rank}", "")
    except RuntimeError as error:
        raise PreflightError(f"{place.node_of(place.rank)} has lost {place.nodes[0]}: {error}") from None
    return content
