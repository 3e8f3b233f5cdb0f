"""Caches on disk that are complete or absent, heal when damaged, and may be built by many processes at once.

A cache is a folder named by a hash of its key (the dataset's fingerprint and every setting that shapes its content).
It is built in a temporary folder, checksummed and renamed, so that no reader sees a part of it. A lock keeps others
from building the same again; correctness does not rest on it, so a lock that does not reach other nodes is safe.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from remit_megatron.data.files import clear_dead, fsync_folder, locked, temporary_name, write_atomically, writing
from remit_megatron.data.manifest import file_sha256
from remit_megatron.errors import RunError, UserError
from remit_megatron.outside import read_object

LEDGER = "cache.json"
INDEX_FOLDER = ".index"
"""Where sample indices lie beside a dataset, unless data.cache_dir names another folder."""


def ensure_cache(root: Path, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of a valid cache for `key`, built where it is missing or damaged.

    `build(folder)` writes any files into an empty folder; equal keys must give equal content. Every file of a cache is
    hashed on each call. Raises RunError where the folder cannot be written or the builder leaves nothing.
    """
    folder = root / cache_name(key)
    if is_valid(folder):
        return folder
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    # Waiting spares the others' work and no more, so a file system without locks will do.
    with locked(root / f".{folder.name}.lock", required=False):
        if is_valid(folder):  # another process built it while this one waited
            return folder
        clear_dead(root, folder.name)
        _build(folder, key, build)
    return folder


def cache_name(key: Mapping[str, Any]) -> str:
    """32 hex digits of a key of JSON values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def cached_key(folder: Path) -> dict[str, Any] | None:
    """The key that a cache was built for, or None where its ledger cannot be read."""
    try:
        key = read_object(folder / LEDGER).get("key")
    except UserError:
        return None
    return key if isinstance(key, dict) else None


def is_valid(folder: Path) -> bool:
    """Whether a cache is there and every file is as it was built."""
    try:
        files = read_object(folder / LEDGER)["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == record["bytes"] and file_sha256(folder / name) == record["sha256"]
            for name, record in files.items()
        )
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # missing or damaged: built again in either case


def _build(folder: Path, key: Mapping[str, Any], build: Callable[[Path], None]) -> None:
    temporary = temporary_name(folder)
    with writing(temporary):
        temporary.mkdir()
    try:
        with writing(temporary):
            build(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if not files:
            raise RunError(f"{temporary}: the builder of this cache wrote no file")
        ledger = {
            "key": dict(key),
            "files": {
                str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            },
        }
        write_atomically(temporary / LEDGER, json.dumps(ledger, indent=1).encode())
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place. A damaged cache in the way is moved aside first; a valid one, built elsewhere, stays."""
    with writing(folder):
        if folder.exists():
            if is_valid(folder):
                return
            aside = temporary_name(folder)
            with suppress(FileNotFoundError):  # another node was faster
                os.replace(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            # A node whose lock did not reach this one was faster. Its cache is as good as ours, if it is whole.
            if not is_valid(folder):
                raise
        fsync_folder(folder.parent)
