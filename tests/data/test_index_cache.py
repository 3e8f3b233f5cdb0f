"""Caches: complete or absent, healed when damaged, built once by many."""

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.data import files, index_cache
from remit_megatron.data.index_cache import LEDGER, cache_name, ensure_cache, is_valid
from remit_megatron.errors import RunError

KEY = {"fingerprint": "ab" * 32, "sequence_length": 128, "seed": 1}


def build(folder: Path) -> None:
    np.save(folder / "index.npy", np.arange(1000))
    (folder / "deep").mkdir()
    (folder / "deep" / "description.txt").write_text("what it is")


def test_built_once_and_keyed_by_content(tmp_path: Path) -> None:
    calls: list[Path] = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        build(folder)

    first = ensure_cache(tmp_path, KEY, counted)
    assert ensure_cache(tmp_path, dict(reversed(KEY.items())), counted) == first
    assert len(calls) == 1
    assert np.array_equal(np.load(first / "index.npy"), np.arange(1000))
    assert json.loads((first / LEDGER).read_text())["key"] == KEY
    for name, value in (("fingerprint", "cd" * 32), ("sequence_length", 64), ("seed", 2)):
        assert ensure_cache(tmp_path, KEY | {name: value}, counted) != first
    assert len(calls) == 4
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda folder: cut(folder / "index.npy"),
    "flipped bit": lambda folder: flip(folder / "index.npy"),
    "file missing": lambda folder: (folder / "index.npy").unlink(),
    "empty": lambda folder: (folder / "index.npy").write_bytes(b""),
    "ledger cut": lambda folder: cut(folder / LEDGER),
    "ledger missing": lambda folder: (folder / LEDGER).unlink(),
    "ledger of nothing": lambda folder: (folder / LEDGER).write_text('{"files": {}}'),
    "ledger a list": lambda folder: (folder / LEDGER).write_text("[]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_heals(name: str, tmp_path: Path) -> None:
    folder = ensure_cache(tmp_path, KEY, build)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    DAMAGES[name](folder)
    assert not is_valid(folder)
    assert ensure_cache(tmp_path, KEY, build) == folder
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder.name, f".{folder.name}.lock"])


def test_killed_while_building(tmp_path: Path) -> None:
    """Nothing of it is taken for a cache, and the lock is free."""
    pid = os.fork()
    if pid == 0:

        def die(folder: Path) -> None:
            build(folder)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            ensure_cache(tmp_path, KEY, die)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / cache_name(KEY)).exists()
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert is_valid(ensure_cache(tmp_path, KEY, build))
    assert list(tmp_path.glob(".*.tmp")) == []


def slow_build(folder: Path) -> None:
    with open(folder.parent / "calls", "a") as file:
        file.write("x")
    time.sleep(0.3)
    build(folder)


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


LOCKS: dict[str, Callable[..., None] | None] = {"locks": None, "local locks": lambda *_: None, "no locks": _no_locks}
"""What stands in for flock: the file system's own, one that does not reach other nodes, one that there is not."""


def _rank(root: str, locks: str, queue: "multiprocessing.Queue[str]") -> None:
    files.fcntl.flock = LOCKS[locks] or files.fcntl.flock  # type: ignore[assignment]
    folder = ensure_cache(Path(root), KEY, slow_build)
    queue.put(f"{folder} {is_valid(folder)} {np.load(folder / 'index.npy').sum()}")


@pytest.mark.parametrize("locks", LOCKS)
@pytest.mark.parametrize("damaged", [False, True])
def test_many_build_at_once(locks: str, damaged: bool, tmp_path: Path) -> None:
    """Every process gets a whole cache; with locks one of them builds it."""
    if damaged:
        cut(ensure_cache(tmp_path, KEY, build) / "index.npy")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(str(tmp_path), locks, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert set(answers) == {f"{tmp_path / cache_name(KEY)} True {sum(range(1000))}"}
    builds = len((tmp_path / "calls").read_text())
    assert builds == 1 if locks == "locks" else builds > 1
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_failures(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="wrote no file"):
        ensure_cache(tmp_path, KEY, lambda folder: None)

    def fails(folder: Path) -> None:
        build(folder)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ensure_cache(tmp_path, KEY, fails)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        ensure_cache(tmp_path / "file" / "deep", KEY, build)


def test_valid_cache_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU nodes may mount prepared data read-only."""
    folder = ensure_cache(tmp_path, KEY, build)
    monkeypatch.setattr(index_cache, "locked", None)  # any attempt to write would call it
    assert ensure_cache(tmp_path, KEY, build) == folder
