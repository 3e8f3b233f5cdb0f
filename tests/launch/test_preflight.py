"""The preflight on two ranks that stand for two nodes, with one fault at a time on the second."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import check, node, together
from launch.preflight.meeting import BadNodes, Place
from launch.preflight.node import node_problems
from launch.preflight.room import check_room, checkpoint_bytes
from launch.preflight.together import blame
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.errors import RunError
from tests.train.runs import settings

FAULTS = ("none", "clock", "disk", "folder", "absent", "wedged", "wedged first", "stuck", "room", "full")
LIMIT_S = 3


def break_rank(fault: str, run: Path) -> Path:
    """Put a fault into this process; the folder that it takes for the run's."""
    if fault == "clock":
        right = time.time
        time.time = lambda: right() - 60
    if fault == "disk":
        node.NODE_FREE_BYTES = 1 << 60
    if fault == "folder":
        other = run.with_name("other")
        (other / "logs").mkdir(parents=True)
        (other / "logs" / ".preflight-0").write_text("of another filesystem")
        return other
    if fault == "absent":
        os._exit(9)
    if fault.startswith("wedged"):
        node.shutil.disk_usage = lambda _: signal.pause()
    if fault == "stuck":
        together.dist.init_process_group = lambda *_, **__: signal.pause()
    return run


def one_rank(rank: int, fault: str, folder: Path) -> None:
    """In a process of its own: the preflight's command, as srun starts it. Does not return."""
    signal.alarm(90)  # one that hangs fails its own test only
    output = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run = folder / "run"
    ours = break_rank(fault, run) if rank == (0 if fault.endswith("first") else 1) else run
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"REMIT_NODES": "alpha,beta", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    limit_s = str(LIMIT_S) if fault in ("absent", "wedged", "wedged first", "stuck") else "60"
    arguments = [str(folder / "recipe.toml"), "--run", str(ours), "--report", str(folder / "bad")]
    check.main([*arguments, "--timeout-s", limit_s])


def all_faults(folder: str) -> None:
    """In a fresh interpreter, whose forks need not import anything again: exit codes of both ranks, for each fault, and
    how many seconds they took."""
    codes, took_s = {}, {}
    for fault in FAULTS:
        # The preflight listens one above the port that it is told.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1] - 1)
        ranks, begun_s = [], time.monotonic()
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    one_rank(rank, fault, Path(folder) / fault)
                os._exit(99)
            ranks.append(pid)
        codes[fault] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        took_s[fault] = time.monotonic() - begun_s
    (Path(folder) / "took.json").write_text(json.dumps(took_s))
    (Path(folder) / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Any:
    """fault -> (exit codes, what rank 0 said, the report for the job script)."""
    for fault in FAULTS:
        run = folder / fault / "run"
        (run / "logs").mkdir(parents=True)
        (folder / fault / "recipe.toml").write_text(dump_toml(parse_recipe(settings(folder / fault, "run"))))
    huge_checkpoint(folder / "room" / "run")
    with full_disk(folder / "full" / "run" / "logs"):
        run_all(folder)
    codes = json.loads((folder / "codes.json").read_text())

    def outcome(fault: str) -> tuple[list[int], str, str | None]:
        report = folder / fault / "bad"
        said = "".join((folder / fault / f"said-{rank}").read_text() for rank in range(2) if codes[fault][rank] != 9)
        return codes[fault], said, report.read_text() if report.exists() else None

    return outcome


def run_all(folder: Path) -> None:
    process = get_context("spawn").Process(target=all_faults, args=(str(folder),))
    process.start()
    process.join()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A filesystem without a free byte, where this process may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        yield
        return
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def huge_checkpoint(run: Path) -> None:
    """A complete one of more than the disk has left, most of it a hole."""
    folder = run / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")
    free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
    with (folder / "weights.distcp").open("wb") as stream:
        stream.truncate(free // 2)


def test_sound_nodes(outcomes: Any) -> None:
    assert outcomes("none") == ([0, 0], "2 nodes, 2 ranks: devices, disk, clock and all-reduce are well\n", None)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("clock", "beta: its clock is -60.0 s from alpha's\n"),
        ("disk", " MB left\n"),
        ("folder", "beta: does not see the run folder that the first node sees\n"),
        ("absent", "beta: rank 1 has not started within 3 s\n"),
    ],
)
def test_a_bad_node_is_named(fault: str, says: str, outcomes: Any) -> None:
    codes, said, report = outcomes(fault)
    assert codes == [87, 9 if fault == "absent" else 87]
    assert said.startswith("remit: preflight: beta: ")
    assert said.endswith(says)
    assert said.count("\n") == 1
    assert report == "beta"


@pytest.mark.parametrize(("fault", "rank", "name"), [("wedged", 1, "beta"), ("wedged first", 0, "alpha")])
def test_a_check_that_hangs_does_not_hang_the_preflight(
    fault: str, rank: int, name: str, outcomes: Any, folder: Path
) -> None:
    """As a look at a dead network filesystem does: its node is named, and both ranks end, in about the time allowed."""
    codes, said, report = outcomes(fault)
    assert codes == [87, 87]
    assert said == f"remit: preflight: {name}: rank {rank}'s checks do not end within {LIMIT_S} s\n"
    assert report == name
    took_s = json.loads((folder / "took.json").read_text())
    # The rest of it goes at the machine's own pace, as where nothing hangs.
    assert LIMIT_S <= took_s[fault] < 2 * LIMIT_S + 4 + took_s["none"]


def test_a_collective_that_hangs_does_not_hang_the_preflight(outcomes: Any) -> None:
    """Of two ranks that wait for each other nobody can say which is at fault: both nodes are told, none excluded."""
    codes, said, report = outcomes("stuck")
    assert codes == [87, 87]
    assert "all-reduce inside the node does not end" in said
    assert said.endswith(", on alpha, beta\n")
    assert report == ""


def test_a_full_disk_is_no_fault_of_a_node(outcomes: Any) -> None:
    codes, said, report = outcomes("room")
    assert codes == [1, 1]
    assert "GB are free, and 2.2 checkpoints of " in said
    assert said.endswith(": free space there\n")
    assert said.count("\n") == 1
    assert report is None


@pytest.mark.skipif(os.geteuid() != 0, reason="a small filesystem is mounted by root only")
def test_a_disk_without_a_free_byte_is_no_fault_of_a_node(outcomes: Any) -> None:
    """Not even what the nodes are to read fits into the run folder: another node would not help."""
    codes, said, report = outcomes("full")
    assert codes == [1, 1]
    assert "logs/.preflight-0: cannot be written: No space left on device: free space there, then start again" in said
    assert said.count("\n") == 1
    assert report is None


def test_room(tmp_path: Path) -> None:
    check_room(tmp_path, 1, 1)
    with pytest.raises(RunError, match="GB are free"):
        check_room(tmp_path, 1 << 60, 1)
    if os.statvfs(tmp_path).f_files:
        with pytest.raises(RunError, match="inodes are free"):
            check_room(tmp_path, 1, 1 << 50)


def test_size_of_the_first_checkpoint(tmp_path: Path) -> None:
    """Before there is one: bf16 weights, float32 weights and two moments of every parameter."""
    recipe = parse_recipe(settings(tmp_path, "run"))
    hidden, ffn, vocab, heads, groups = 32, 48, 61, 4, 2
    qkv = hidden * (hidden + 2 * hidden * groups // heads)
    layer = qkv + hidden * hidden + 3 * hidden * ffn + 2 * hidden
    parameters = 4 * layer + vocab * hidden + hidden
    assert checkpoint_bytes(recipe, tmp_path / "run") == 14 * parameters


def test_who_is_to_blame() -> None:
    """Of three nodes of two ranks, the one whose ranks are missing; where all are, nobody."""
    place = Place(rank=0, world_size=6, ranks_per_node=2, local_rank=0, nodes=("a", "b", "c"))
    everyone = set(range(6))

    def blamed(node: set[int], all_: set[int]) -> dict[str, str]:
        return blame(place, lambda step: {"node": node, "all": all_}[step], [], time.monotonic())

    assert blamed(everyone, everyone) == {}
    assert list(blamed(everyone - {2, 3}, set())) == ["b"]
    assert list(blamed(everyone, everyone - {4})) == ["c"]
    unknown = BadNodes(blamed(everyone, set()))
    assert unknown.names == []
    assert "on a, b, c" in str(unknown)


def test_a_node_with_fewer_devices_than_ranks() -> None:
    place = Place(rank=1, world_size=2, ranks_per_node=2, local_rank=1, nodes=("a",))
    assert node_problems(None, place) == [f"{node.torch.cuda.device_count()} CUDA devices for 2 ranks"]
