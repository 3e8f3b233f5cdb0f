"""Process groups of several sizes in one spawn, and a count of the collectives in a piece of code."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

WORLD = 4
SIZES = (1, 2, 4)


class CollectiveCounter(TorchDispatchMode):
    """Counts the process group operations that the code under it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def make_groups(rank: int) -> dict[int, dist.ProcessGroup]:
    """Of each size, the group of consecutive ranks that this rank is in."""
    mine = {}
    for size in SIZES:
        for first in range(0, WORLD, size):
            members = list(range(first, first + size))
            group = dist.new_group(members)
            if rank in members:
                mine[size] = group
    return mine
