"""What the ranks find together: who does not report, whose clock is off, and whether an all-reduce ends."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from launch.preflight.meeting import POLL_S, UNKNOWN, Place, connect, tell, told
from launch.preflight.node import endless

CLOCK_SKEW_S = 2.0
"""Between a node and the first one: above it, times of files and logs mislead, and certificates may be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank found."""

    problems: list[str] = field(default_factory=list)
    token: str = ""
    """What it reads in the run folder: the first rank's, if they see the same folder."""


def collect(store: dist.Store, place: Place, token: str, timeout_s: float) -> dict[str, str]:
    """On rank 0: the bad nodes, from every rank's report and every node's clock."""
    bad: dict[str, str] = {}
    begun = time.monotonic()
    for rank in range(place.world_size):
        node, here = place.node_of(rank), False
        # Asked for, not waited for: a wait that times out fills the log with the store's own remarks.
        while not store.check([f"report/{rank}"]) and time.monotonic() < begun + (1 + here) * timeout_s:
            here = here or store.check([f"here/{rank}"])
            time.sleep(POLL_S)
        if not store.check([f"report/{rank}"]):
            late = endless(rank, timeout_s) if here else f"rank {rank} has not started within {timeout_s:.0f} s"
            bad.setdefault(node, late)
            continue
        report = Report(**json.loads(store.get(f"report/{rank}")))
        if report.problems:
            bad.setdefault(node, report.problems[0])
        elif report.token != token:
            bad.setdefault(node, "does not see the run folder that the first node sees")
    for rank in range(place.ranks_per_node, place.world_size, place.ranks_per_node):
        if place.node_of(rank) not in bad:
            skew_s, doubt_s = _clock_skew(store, rank)
            if abs(skew_s) > CLOCK_SKEW_S + doubt_s:
                bad[place.node_of(rank)] = f"its clock is {skew_s:+.1f} s from {place.nodes[0]}'s"
    return bad


def _clock_skew(store: dist.Store, rank: int) -> tuple[float, float]:
    """Seconds that a rank's clock is ahead of this one's, and by how much that may be wrong."""
    sent = time.time()
    store.set(f"ping/{rank}", "")
    there = float(store.get(f"pong/{rank}"))
    received = time.time()
    return there - (sent + received) / 2, (received - sent) / 2


def answer_ping(store: dist.Store, place: Place, timeout_s: float) -> None:
    """On the other ranks: tell rank 0 the time, once for each node."""
    if place.rank % place.ranks_per_node:
        return
    # The verdict is there instead of a ping when this node is bad.
    deadline = time.monotonic() + 2 * timeout_s
    while time.monotonic() < deadline and not store.check(["verdict"]):
        if store.check([f"ping/{place.rank}"]):
            store.set(f"pong/{place.rank}", repr(time.time()))
            return
        time.sleep(POLL_S)


def all_reduce(store: dist.Store, device: torch.device | None, place: Place, timeout_s: float) -> dict[str, str]:
    """Sum over each node's ranks, then over all. In a thread, for what hangs there cannot be interrupted."""
    assert device is not None
    failures: list[str] = []
    # A connection of its own: while one thread waits for a key, the others cannot use the same one.
    connection = connect(place, serve=False, timeout_s=timeout_s)

    def reduce() -> None:
        try:
            backend = "nccl" if device.type == "cuda" else "gloo"
            # Longer than what this check waits for: NCCL's own watchdog would end the rank without a report.
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("reduce", connection),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=10 * timeout_s),
            )
            for step, group in (("node", _node_group(place)), ("all", None)):
                ones = torch.ones(1 << 20, device=device)
                dist.all_reduce(ones, group=group)
                if float(ones.min()) != float(ones.max()) or float(ones[0]) != dist.get_world_size(group):
                    raise RuntimeError(f"the sum of {dist.get_world_size(group)} ones is {float(ones[0])}")
                connection.set(f"{step}/{place.rank}", "")
        except RuntimeError as error:
            failures.append(" ".join(str(error).split())[:200])

    thread = threading.Thread(target=reduce, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if place.rank:
        return dict(told(store, place, "reduced"))
    deadline = time.monotonic() + timeout_s / 4

    def finished(step: str) -> set[int]:
        return {rank for rank in range(place.world_size) if store.check([f"{step}/{rank}"])}

    bad = blame(place, finished, failures, deadline)
    tell(store, place, "reduced", bad)
    return bad


def blame(place: Place, finished: Callable[[str], set[int]], failures: list[str], deadline: float) -> dict[str, str]:
    """The nodes that keep an all-reduce from ending: those of the ranks that have not done a step that others have.

    finished: the ranks that have done "node", inside each node, or "all", between them. deadline: of time.monotonic().
    """
    everyone = set(range(place.world_size))
    while finished("all") != everyone and time.monotonic() < deadline:
        time.sleep(0.05)
    for step, what in (("node", "inside the node"), ("all", "between the nodes")):
        missing = everyone - finished(step)
        nodes = {place.node_of(rank) for rank in missing}
        reason = f"all-reduce {what} does not end" + (f": {failures[0]}" if failures else "")
        if missing and len(nodes) < len(place.nodes):
            return dict.fromkeys(sorted(nodes), reason)
        if missing:
            return {UNKNOWN: f"{reason}, on {', '.join(place.nodes)}"}
    return {}


def _node_group(place: Place) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups(place.ranks_per_node)
    assert isinstance(group, dist.ProcessGroup)
    return group
