"""Every node is looked at before training: `python -m launch.preflight RECIPE --run RUN --report FILE` on every rank.

A fault of the run's folder ends with code 1; one of a node with 87, and FILE then holds the names of the bad nodes,
separated by commas, for the job script to exclude.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.rank import torch_variables
from remit_megatron.config import Recipe, load_recipe
from remit_megatron.errors import PreflightError, RemitError, RunError
from remit_megatron.hf.config import read_json
from remit_megatron.hf.folder import is_hf_folder
from remit_megatron.hf.mapping import read_shape
from remit_megatron.presets import preset_shape
from remit_megatron.shape import resolve_shape
from remit_megatron.train.checkpoint import CheckpointFolder, read_meta, resolve_checkpoint

CHECKPOINTS_FREE = 2.2
"""Room for so many: one is written before the oldest goes, and metrics and logs want some."""
BYTES_PER_PARAMETER = 14
"""bf16 weights, and float32 weights and two moments of AdamW."""
FILES_PER_RANK = 8
NODE_FREE_BYTES = 1 << 30
POLL_S = 0.01
TOLD_S = 10.0
"""How long rank 0 waits for the others to read what it tells them."""
CLOCK_SKEW_S = 2.0
"""Between a node and the first one: above it, times of files and logs mislead, and certificates may be refused."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank found."""

    problems: list[str] = field(default_factory=list)
    token: str = ""
    """What it reads in the run folder: the first rank's, if they see the same folder."""


def check_nodes(recipe: Recipe, run: Path, place: Place, timeout_s: float) -> None:
    """Look at every node; called on every rank.

    Raises RunError for the run folder's faults, PreflightError naming the bad nodes.
    """
    token_file = run / "logs" / f".preflight-{os.environ.get('SLURM_JOB_ID', '0')}"
    expected = f"{time.time_ns()}"
    full: str | None = None
    if place.rank == 0:
        try:
            token_file.write_text(expected)
        except OSError as error:
            full = f"{token_file}: cannot be written: {error.strerror or error}: free space there, then start again"
    store = _connect(place, serve=place.rank == 0, timeout_s=timeout_s)
    store.set_timeout(timedelta(seconds=4 * timeout_s))
    store.set(f"here/{place.rank}", "")
    device, problems = _look(recipe, place, timeout_s)
    report = Report(problems=problems, token=_read(token_file))
    store.set(f"report/{place.rank}", json.dumps(asdict(report)))
    if place.rank == 0:
        bad = _collect(store, place, expected, timeout_s)
        full = full or _room_problem(recipe, run, place)
        token_file.unlink(missing_ok=True)
        _tell(store, place, "verdict", [full, bad])
    else:
        _answer_ping(store, place, timeout_s)
        full, bad = _told(store, place, "verdict")
    if full:
        raise RunError(full)
    if not bad:
        bad = _all_reduce(store, device, place, timeout_s)
    if bad:
        raise BadNodes(bad)


def _connect(place: Place, serve: bool, timeout_s: float) -> dist.TCPStore:
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


def _tell(store: dist.Store, place: Place, name: str, content: Any) -> None:
    """On rank 0, which serves the store: to every rank, and wait until those that report have read it."""
    store.set(name, json.dumps(content))
    others = [rank for rank in range(1, place.world_size) if store.check([f"report/{rank}"])]
    deadline = time.monotonic() + TOLD_S
    while others and time.monotonic() < deadline:
        others = [rank for rank in others if not store.check([f"{name}/{rank}"])]
        time.sleep(POLL_S)


def _told(store: dist.Store, place: Place, name: str) -> Any:
    """On the other ranks. Raises PreflightError where rank 0 has gone."""
    try:
        content = json.loads(store.get(name))
        store.set(f"{name}/{place.rank}", "")
    except RuntimeError as error:
        raise PreflightError(f"{place.node_of(place.rank)} has lost {place.nodes[0]}: {error}") from None
    return content


class BadNodes(PreflightError):
    """Nodes by name, with what is wrong. `unknown` stands for a fault that no node can be blamed for."""

    def __init__(self, nodes: dict[str, str]):
        super().__init__("; ".join(f"{node}: {problem}" for node, problem in nodes.items()))
        self.names = [node for node in nodes if node != UNKNOWN]


UNKNOWN = "unknown"


# What one rank finds.


def checkpoint_bytes(recipe: Recipe, run: Path) -> int:
    """Size of the next checkpoint: of the largest one there, else from the model's parameters."""
    # Whether the pointer is right, and what to do if it is not, is for the trainer to say.
    folder = CheckpointFolder(run / "checkpoints", keep=1)
    named = folder.named()
    there = [path for path in ([named, *folder.before(named)] if named else []) if path.is_dir()]
    if there:
        return max(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in there)
    carried = None
    if recipe.model.init and is_hf_folder(recipe.model.init):
        path = Path(recipe.model.init) / "config.json"
        carried = read_shape(read_json(path), str(path))
    elif recipe.model.init:
        carried = read_meta(resolve_checkpoint(recipe.model.init, "model.init")).model_shape()
    elif recipe.model.preset:
        carried = preset_shape(recipe.model.preset)
    return resolve_shape(recipe.model, carried).num_parameters() * BYTES_PER_PARAMETER


def check_room(run: Path, needed_bytes: int, needed_files: int) -> None:
    """Raise RunError where the run folder's filesystem lacks space or inodes for the next checkpoints."""
    status = os.statvfs(run)
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    wanted, wanted_files = CHECKPOINTS_FREE * needed_bytes, CHECKPOINTS_FREE * needed_files
    if free < wanted:
        raise RunError(
            f"{run}: {free / 1e9:,.1f} GB are free, and {CHECKPOINTS_FREE} checkpoints of {needed_bytes / 1e9:,.1f} GB "
            f"need {wanted / 1e9:,.1f}: free space there"
        )
    # Some filesystems make inodes as they need them, and count none.
    if status.f_files and files < wanted_files:
        raise RunError(f"{run}: {files:,} inodes are free, and {wanted_files:,.0f} are needed: remove files there")


def _room_problem(recipe: Recipe, run: Path, place: Place) -> str | None:
    try:
        check_room(run, checkpoint_bytes(recipe, run), FILES_PER_RANK * place.world_size)
    except RemitError as error:
        return str(error)
    return None


def _look(recipe: Recipe, place: Place, timeout_s: float) -> tuple[torch.device | None, list[str]]:
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
        return None, [_endless(place.rank, timeout_s)]


def _endless(rank: int, timeout_s: float) -> str:
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


def _read(path: Path) -> str:
    """Network filesystems may show a new file a moment late."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return path.read_text()
        except OSError:
            time.sleep(0.2)
    return ""


# What the ranks find together.


def _collect(store: dist.Store, place: Place, token: str, timeout_s: float) -> dict[str, str]:
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
            late = _endless(rank, timeout_s) if here else f"rank {rank} has not started within {timeout_s:.0f} s"
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


def _answer_ping(store: dist.Store, place: Place, timeout_s: float) -> None:
    if place.rank % place.ranks_per_node:
        return
    # The verdict is there instead of a ping when this node is bad.
    deadline = time.monotonic() + 2 * timeout_s
    while time.monotonic() < deadline and not store.check(["verdict"]):
        if store.check([f"ping/{place.rank}"]):
            store.set(f"pong/{place.rank}", repr(time.time()))
            return
        time.sleep(POLL_S)


def _all_reduce(store: dist.Store, device: torch.device | None, place: Place, timeout_s: float) -> dict[str, str]:
    """Sum over each node's ranks, then over all. In a thread, for what hangs there cannot be interrupted."""
    assert device is not None
    failures: list[str] = []
    # A connection of its own: while one thread waits for a key, the others cannot use the same one.
    connection = _connect(place, serve=False, timeout_s=timeout_s)

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
        return dict(_told(store, place, "reduced"))
    deadline = time.monotonic() + timeout_s / 4

    def finished(step: str) -> set[int]:
        return {rank for rank in range(place.world_size) if store.check([f"{step}/{rank}"])}

    bad = _blame(place, finished, failures, deadline)
    _tell(store, place, "reduced", bad)
    return bad


def _blame(place: Place, finished: Callable[[str], set[int]], failures: list[str], deadline: float) -> dict[str, str]:
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    arguments = parser.parse_args(argv)
    os.environ.update(torch_variables(os.environ))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = Place(
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        ranks_per_node=per_node,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        nodes=tuple(os.environ.get("REMIT_NODES", socket.gethostname()).split(",")),
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    try:
        recipe = load_recipe(arguments.recipe)
        check_nodes(recipe, arguments.run, place, arguments.timeout_s)
        if rank == 0:
            print(f"{len(place.nodes)} nodes, {place.world_size} ranks: devices, disk, clock and all-reduce are well")
        code = 0
    except RemitError as error:
        # What all have found is said once; of what only this rank has found nobody else knows.
        if rank == 0 or type(error) is PreflightError:
            print(f"remit: preflight: {error}", file=sys.stderr)
        if rank == 0 and isinstance(error, BadNodes):
            arguments.report.write_text(",".join(error.names))
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that hangs in its thread must not hold up the verdict.
    os._exit(code)


if __name__ == "__main__":
    main()
