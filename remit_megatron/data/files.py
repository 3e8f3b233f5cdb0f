"""Files that are complete or absent, whatever kills the process or the machine; locks that end with their process."""

import errno
import fcntl
import functools
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from remit_megatron.errors import RunError, UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock answers on a file system without locks, such as Lustre mounted without `flock`."""
GLANCE_S = 0.5
"""A lock that is held for less is another process's look at it (`is_held`), and no reason to refuse."""
FOREIGN_DEAD_S = 24 * 3600
"""What a writer of another machine left is taken for dead when nothing in it has changed for so long."""
NAME_BYTES = 40
"""Of a file's name, as much as a temporary name keeps: the whole must stay below the 255 bytes of a file system."""


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the renames and creations in a folder survive a power cut."""
    sync_file(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file: temporary name, fsync, rename, fsync of the folder.

    Any number of writers may do so at once: one of their contents stays, whole. Raises RunError where the file cannot
    be written. A killed writer leaves its temporary file, which `clear_dead` removes.
    """
    temporary = temporary_name(path)
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses, wherever it runs: .NAME.PLACE-PID-RANDOM.tmp."""
    name = os.fsencode(path.name)[:NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def clear_dead(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders in `folder` whose writer is certainly gone.

    name: of the file that they were for; default: of any. Gone is a process of this machine that no longer lives, and
    one of another machine whose file or folder has not changed for a day. What cannot be looked at or deleted stays.
    """
    wanted = os.fsencode(name)[:NAME_BYTES].decode(errors="ignore")
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            stem, _, owner = entry.name.removesuffix(".tmp").rpartition(".")
            if entry.name.endswith(".tmp") and stem.startswith(".") and (not name or stem == f".{wanted}"):
                with suppress(OSError):
                    _clear(Path(entry.path), owner)


def _clear(path: Path, owner: str) -> None:
    place, _, rest = owner.partition("-")
    pid, _, random = rest.partition("-")
    if not (len(place) == 8 and pid.isdecimal() and len(random) == 8):
        return
    dead = not _is_alive(int(pid)) if place == _place() else time.time() - _last_change(path) > FOREIGN_DEAD_S
    if dead and path.is_dir():
        shutil.rmtree(path)
    elif dead:
        path.unlink()


def _last_change(path: Path) -> float:
    return max(one.stat().st_mtime for one in (path, *path.rglob("*")))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@functools.cache
def _place() -> str:
    """Eight hex digits of where this process's number means something: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        place = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        place = socket.gethostname()
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def close_quietly(file: IO[bytes]) -> None:
    """Close a file whose content does not count: closing flushes, which a full disk refuses."""
    with suppress(OSError):
        file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a RunError with the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}{_remedy(error)}") from error


def make_folder(folder: Path, key: str) -> None:
    """Create a folder that a user has named, before work is put into it; `key` is what named it.

    Raises UserError where that place is no folder or not this user's to write to, RunError for a disk that fails.
    """
    check_place(folder, key)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_place(folder: Path, key: str) -> None:
    """That a folder is there or can be made, without making it. Raises UserError where not, as `make_folder`."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {_cut(folder)} cannot be a folder: {_reason(error)}: name another one") from None
    if not there.is_dir():
        raise UserError(f"{key}: {folder} cannot be written to: {there} is no folder: name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written to: {there} is not yours to write to: name another one")


def _is_there(path: Path) -> bool:
    """As os.path.lexists, but a name that no file system takes is an error."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _cut(path: Path) -> str:
    return repr(str(path)[:100] + ("..." if len(str(path)) > 100 else ""))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _remedy(error: OSError) -> str:
    # numpy reports a write that was cut short, which only a full disk does, in words and without a number.
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error)):
        return ": free space there, then start the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ": choose a folder that can be written to"
    return ""


class NoLocks(UserError):
    """The file system does not lock files."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that this process holds."""

    path: Path
    descriptor: int
    """Of the locked file, open for as long as the lock is held."""

    def is_in_place(self) -> bool:
        """Whether the file of that name is still the locked one, and not gone or another: its folder was moved."""
        try:
            there, ours = os.stat(self.path), os.fstat(self.descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of `locked`. Writes nothing. Raises NoLocks."""
    try:
        with path.open("rb") as stream:
            _flock(stream.fileno(), path, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: it is in no other look's way
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(path: Path, busy: str | None = None, *, required: bool = True, remove: bool = False) -> Iterator[Lock]:
    """The kernel's lock on a file: it goes with the process, however that ends.

    busy: what the UserError says where another process holds it. None: wait for that one.
    required: raise NoLocks on a file system without locks; otherwise go on without.
    remove: delete the file in the end, while it is locked; without, it stays for the next one.
    """
    try:
        stream = _take(path, busy, required)
    except NoLocks:
        if remove:
            path.unlink(missing_ok=True)
        raise
    with stream:
        lock = Lock(path, stream.fileno())
        try:
            yield lock
        finally:
            if remove and lock.is_in_place():
                path.unlink(missing_ok=True)


def _take(path: Path, busy: str | None, required: bool) -> IO[bytes]:
    """The open file, locked and still in place."""
    patience = time.monotonic() + GLANCE_S
    while True:
        with writing(path):
            stream = path.open("ab")
        try:
            _flock(stream.fileno(), path, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            if Lock(path, stream.fileno()).is_in_place():
                return stream
        except NoLocks:
            if not required:
                return stream
            stream.close()
            raise
        except BlockingIOError:
            if time.monotonic() > patience:
                stream.close()
                raise UserError(busy or "") from None
            time.sleep(0.02)
        stream.close()  # where it is locked, its last holder has moved or removed it meanwhile


def _flock(descriptor: int, path: Path, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NoLocks(
                f"{path}: this file system does not lock files ({error.strerror}): mount it with locks (Lustre: the "
                "option flock), or name a place on another file system"
            ) from None
        raise
