"""Locks, temporary files and their leftovers, against real processes."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from remit_megatron.data import files
from remit_megatron.data.files import NoLocks, clear_dead, is_held, locked, temporary_name, write_atomically
from remit_megatron.errors import RunError, UserError


def die_while(action: str, folder: Path) -> None:
    """Run code in a process of its own, which ends by SIGKILL where the code says so."""
    head = "import os, signal\nfrom pathlib import Path\nfrom remit_megatron.data import files\n"
    head += f"folder = Path({str(folder)!r})\n"
    done = subprocess.run([sys.executable, "-c", head + action], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED_AT_THE_RENAME = """
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(folder / "state.json", b"new")
"""


def test_writers_at_once_and_killed_ones(tmp_path: Path) -> None:
    """Each has a name of its own; what a killed one left is cleared, what a living one writes is not."""
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    for _ in range(2):
        die_while(KILLED_AT_THE_RENAME, tmp_path)
    left = sorted(tmp_path.glob(".state.json.*.tmp"))
    assert len(left) == 2
    assert path.read_bytes() == b"old"
    living, other = temporary_name(path), temporary_name(tmp_path / "state.jsonl")
    living.write_bytes(b"")
    other.mkdir()
    (other / "file").write_bytes(b"")
    foreign = tmp_path / ".state.json.00000000-1-00000000.tmp"  # of another machine, just now
    foreign.write_bytes(b"")
    users = tmp_path / ".state.json.mine.tmp"
    users.write_bytes(b"")
    clear_dead(tmp_path, "state.json")
    assert set(tmp_path.iterdir()) == {path, living, other, foreign, users}
    os.utime(foreign, (0, 0))
    clear_dead(tmp_path)
    assert set(tmp_path.iterdir()) == {path, living, other, users}
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(50):
                write_atomically(path, content)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 1000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(path.read_bytes())) == 1
    assert len(path.read_bytes()) == 1000


def test_temporary_names_of_long_names(tmp_path: Path) -> None:
    """A name of 255 bytes can be written, in letters of one byte and of three."""
    for name in ("a" * 255, "\u6f22" * 85):
        write_atomically(tmp_path / name, b"x")
    assert len(list(tmp_path.iterdir())) == 2


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    assert not path.exists(), "a look writes nothing"
    with locked(path, "busy") as lock:
        assert is_held(path)
        assert lock.is_in_place()
        with pytest.raises(UserError, match="busy"), locked(path, "busy"):
            pass
        os.rename(path, tmp_path / "moved")
        assert not lock.is_in_place()
    assert not is_held(tmp_path / "moved")
    die_while("with files.locked(folder / 'lock', 'busy'):\n    os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    with locked(path, "busy", remove=True):
        pass
    assert not path.exists()


def test_a_look_is_in_nobodys_way(tmp_path: Path) -> None:
    path, stop = tmp_path / "lock", threading.Event()
    path.touch()

    def look() -> None:
        while not stop.is_set():
            is_held(path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with locked(path, "busy"):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_lock_that_was_removed_meanwhile(tmp_path: Path) -> None:
    """Who waited for a lock whose holder has removed the file holds the new file's, not a lock on nothing."""
    path, order = tmp_path / "lock", []

    def second() -> None:
        with locked(path, remove=True) as lock:
            order.append(lock.is_in_place())

    with locked(path, remove=True):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
    thread.join()
    assert order == [True]
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as such; a cache goes on without."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    path = tmp_path / "lock"
    path.touch()
    for busy in ("busy", None):
        said = r"lock: this file system does not lock files .*: mount it with locks"
        with pytest.raises(NoLocks, match=said), locked(path, busy):
            pass
    with pytest.raises(NoLocks):
        is_held(path)
    with locked(path, required=False):
        pass


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    for name, reason in (("a" * 256, "File name too long"), ("a\0b", "null")):
        with pytest.raises(UserError, match=f"--output: .* cannot be a folder: .*{reason}"):
            files.make_folder(tmp_path / name, "--output")
    with pytest.raises(RunError, match="File name too long"):
        write_atomically(tmp_path / ("a" * 256), b"")
