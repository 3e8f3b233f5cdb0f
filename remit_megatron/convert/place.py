"""A folder that is whole or absent, made by one process at a time; what a killed one left is cleared by the next."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remit_megatron.data.files import fsync_folder, locked, writing
from remit_megatron.errors import UserError


def check_target(target: Path) -> None:
    """Raise UserError where a new folder cannot be made in that place, before anything is read or imported for it."""
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: is no folder: make it first")
    if target.exists() and not target.is_dir():
        raise already_there(target)


def already_there(target: Path) -> UserError:
    return UserError(f"{target}: exists already: name a new folder, or remove it")


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """The path of a folder beside `target`, which is absent, for `finish` to move into place; a second process waits.

    The lock is the file .NAME.lock. It ends with its process, so the folder that is found once it is held was left by
    a dead one, and is removed; so is that of a block that raises. A file system without locks is used without: two
    processes that make one folder there are in each other's way.
    """
    check_target(target)
    partial = target.with_name(f".{target.name}-partial")
    with locked(target.with_name(f".{target.name}.lock"), required=False) as lock, writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if lock.is_in_place():
                lock.path.unlink()


def finish(partial: Path, target: Path) -> None:
    """Give a folder that is complete its name, durably."""
    with writing(target):
        fsync_folder(partial)
        partial.rename(target)
        fsync_folder(target.parent)
