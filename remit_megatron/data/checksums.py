"""Checksums of a folder's files, written with it and checked before it is used: manifest.json.

`{"files": {name: {"bytes", "sha256"}}, "checksum"}`; the checksum is the SHA-256 of the manifest's own content.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.outside import parse_object, quote, read_object

NAME = "manifest.json"
THREADS = max(2, min(16, os.cpu_count() or 2))
"""Files that are hashed at a time. One core hashes 0.4 to 2 GB/s."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """Of one file."""

    bytes: int
    sha256: str


def of_file(path: Path) -> Checksum:
    """Reads the file whole."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Checksum(stream.tell(), digest)


def of_files(paths: Iterable[Path]) -> dict[str, Checksum]:
    """Name to checksum; several files at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        return {path.name: checksum for path, checksum in zip(paths, pool.map(of_file, paths), strict=True)}


def own_checksum(content: dict[str, Any]) -> str:
    """Of a JSON object, to be stored in it under the key `checksum`."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of its own, for `read_record`. Raises RunError where it cannot be written."""
    whole = {**content, "checksum": own_checksum(content)}
    write_atomically(path, (json.dumps(whole, indent=1) + "\n").encode())


def read_record(path: Path, remedy: str, *, unbound: bool = False) -> dict[str, Any]:
    """What `write_record` wrote. Raises DamagedError naming the file and the remedy.

    unbound: take an object without a checksum too, as older versions wrote it.
    """
    try:
        content = read_object(path)
    except UserError as error:
        raise DamagedError(f"{error}; {remedy}") from None
    checksum = content.pop("checksum", None)
    if checksum != own_checksum(content) and not (unbound and checksum is None):
        raise DamagedError(f"{path}: its own checksum does not match, so it was damaged or edited; {remedy}")
    return content


def write(folder: Path, files: dict[str, Checksum]) -> None:
    """Write the manifest. Raises RunError where it cannot be written."""
    content: dict[str, Any] = {"files": {name: asdict(files[name]) for name in sorted(files)}}
    content["checksum"] = own_checksum(content)
    write_atomically(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def read(folder: Path) -> dict[str, Checksum]:
    """What the folder's files should be. Raises DamagedError naming the manifest."""
    try:
        content = parse_object((folder / NAME).read_bytes(), NAME)
        files = {name: Checksum(**values) for name, values in content["files"].items()}
        if content["checksum"] != own_checksum(content):
            raise ValueError("its own checksum does not match")
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files elsewhere")
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {NAME} is missing") from None
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{folder}: {NAME} is damaged: {quote(str(error))}") from None
    return files


def problems(folder: Path, files: dict[str, Checksum], *, content: bool) -> list[str]:
    """A line for each file that is missing, has another size or, with `content`, holds something else."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _problem(folder / item[0], item[1], content), files.items())
        return [problem for problem in found if problem]


def whole(folder: Path) -> bool:
    """Whether every file is there in its size; reads no content."""
    try:
        return not problems(folder, read(folder), content=False)
    except DamagedError:
        return False


def _problem(path: Path, wanted: Checksum, content: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted.bytes:
            return f"{path.name} has {size:,} bytes in place of {wanted.bytes:,}"
        if content and of_file(path).sha256 != wanted.sha256:
            return f"{path.name} has changed: its SHA-256 is not the one it was written with"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None
