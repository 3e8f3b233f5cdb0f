"""Identities of files by content. A hash is kept for as long as a file's size, times and inode stay as they were."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remit_megatron.data.files import locked, write_atomically
from remit_megatron.errors import UserError

PROSE = ".md"
"""The ending of what a model's folder has for people: nothing is computed with it."""


def digest(value: Any) -> str:
    """Twelve hex digits of a JSON value; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Contents:
    """Hashes of files, with a memory on disk.

    memory: a JSON file, `{path: [size, mtime_ns, ctime_ns, inode, sha256]}`; one that is damaged counts as empty.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            known = json.loads(memory.read_text())
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):  # hashes are remembered to save time: without them files are read again
            self._known = {}

    def file(self, path: Path, key: str) -> str:
        """SHA-256 of a file in hex. Raises UserError, naming the key that named it, where it cannot be read."""
        name = str(path.absolute())
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            known = self._known.get(name)
            if isinstance(known, list) and known[:-1] == stamp:
                return str(known[-1])
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{key}: {path} cannot be read: {error.strerror or error}") from None
        self._known[name] = [*stamp, found]
        self._changed = True
        return found

    def files(self, paths: Iterable[Path], key: str) -> str:
        """Twelve hex digits of several files, by content and order; their names do not count."""
        return digest([self.file(path, key) for path in paths])

    def model(self, folder: Path, key: str) -> str:
        """Sixteen hex digits of a Hugging Face folder: config, weights and tokenizer, by name and content."""
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}: {folder} is no Hugging Face folder: it has no config.json")
        return model_identity({path.name: self.file(path, key) for path in model_files(folder)})

    def save(self) -> None:
        """Write what was learnt. Raises RunError where it cannot be written."""
        if self._changed:
            with locked(self._memory.with_name(f"{self._memory.name}.lock")):
                write_atomically(self._memory, json.dumps(self._known).encode())
            self._changed = False


def model_files(folder: Path) -> list[Path]:
    """What makes up a model: every file of its folder but prose and hidden files, by name."""
    found = (p for p in folder.iterdir() if p.is_file() and p.suffix != PROSE and not p.name.startswith("."))
    return sorted(found, key=lambda path: path.name)


def model_identity(sums: dict[str, str]) -> str:
    """Sixteen hex digits of file names and their SHA-256."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
