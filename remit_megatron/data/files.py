"""Files that are complete or absent, whatever kills the process or the machine; locks that end with their process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from remit_megatron.errors import RunError, UserError


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
    """Write a whole file: temporary name, fsync, rename, fsync of the folder. For one writer at a time.

    The temporary name is always the same, so that a killed writer's is used up by the next. Raises RunError where the
    file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{key}: {folder} cannot be written to: {there} is no folder: name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written to: {there} is not yours to write to: name another one")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ": free space there, then start the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ": choose a folder that can be written to"
    return ""


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of `locked`."""
    try:
        with path.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """The kernel's lock on a file: it goes with the process, however that ends.

    busy: what the UserError says where another process holds it. None: wait for that one.
    """
    with writing(path), path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy or "") from None
        yield
