"""Parts: the unit that survives a crash. One file each, complete or absent, written by one worker.

A part holds the ids and the document lengths of a stretch of one task, the records of what could not be read, and a
footer that says what it holds and where the next part begins. Its name orders it: task, then number within the task.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from remit_megatron.data.files import close_quietly, fsync_folder, writing
from remit_megatron.errors import RunError

MAGIC = b"RMTPART1"


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part says of itself. Layout: ids, lengths (int32), bad documents (JSON lines), footer, its size, magic."""

    position: int
    """Where the task goes on after this part."""
    last: bool
    """Whether the task ends with it."""
    num_tokens: int
    num_documents: int
    largest_id: int
    num_empty: int
    num_bad: int
    size: int
    """Bytes of text read."""
    disk_bytes: int
    """Bytes of the input file passed."""
    bin_bytes: int
    bad_bytes: int


class PartWriter:
    """Writes one part under a temporary name; `commit` makes it appear."""

    def __init__(self, folder: Path, task: int, number: int, dtype: np.dtype) -> None:
        self.path = part_path(folder, task, number)
        self.dtype = dtype
        self._temporary = folder / f".{self.path.name}.{os.getpid()}.tmp"
        self._lengths: list[np.ndarray] = []
        self._bad: list[bytes] = []
        self.counts = {"num_tokens": 0, "num_documents": 0, "largest_id": 0, "num_empty": 0, "num_bad": 0,
                       "size": 0, "disk_bytes": 0}  # fmt: skip
        with writing(self._temporary):
            self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit or abandon

    def append_ids(self, tokens: np.ndarray, largest_id: int) -> None:
        """Add ids of the dataset's dtype."""
        with writing(self._temporary):
            self._file.write(tokens.view(np.uint8).data)
        self.counts["num_tokens"] += len(tokens)
        self.counts["largest_id"] = max(self.counts["largest_id"], largest_id)

    def append_lengths(self, lengths: np.ndarray) -> None:
        """Add lengths of documents whose ids were added."""
        self._lengths.append(lengths.astype("<i4"))
        self.counts["num_documents"] += len(lengths)

    def passed(self, *, empty: int, bad: list[dict[str, Any]], size: int, disk_bytes: int) -> None:
        """Count what was read besides ids."""
        self._bad.extend(json.dumps(record).encode() + b"\n" for record in bad)
        self.counts["num_empty"] += empty
        self.counts["num_bad"] += len(bad)
        self.counts["size"] += size
        self.counts["disk_bytes"] += disk_bytes

    def commit(self, position: int, last: bool) -> Footer:
        """Write lengths and footer, fsync, rename. Raises RunError where the disk refuses; nothing appears then."""
        bad = b"".join(self._bad)
        bin_bytes = self.counts["num_tokens"] * self.dtype.itemsize
        footer = Footer(position=position, last=last, bin_bytes=bin_bytes, bad_bytes=len(bad), **self.counts)
        raw = json.dumps(asdict(footer)).encode()
        with writing(self._temporary):
            for lengths in self._lengths:
                self._file.write(lengths.tobytes())
            self._file.write(bad + raw + struct.pack("<I", len(raw)) + MAGIC)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            fsync_folder(self.path.parent)
        return footer

    def abandon(self) -> None:
        """Delete the temporary file, where there still is one."""
        close_quietly(self._file)
        self._temporary.unlink(missing_ok=True)


def part_path(folder: Path, task: int, number: int) -> Path:
    return folder / f"{task:07d}-{number:05d}.part"


def read_footer(path: Path) -> Footer | None:
    """The footer of a part, None where there is no such part. Raises RunError for a damaged one."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - len(MAGIC) - 4))
            tail = file.read()
            if tail[4:] != MAGIC:
                raise RunError(f"{path}: damaged part; delete this file and start the same command again")
            (length,) = struct.unpack("<I", tail[:4])
            file.seek(end - len(tail) - length)
            footer = Footer(**json.loads(file.read(length)))
            if end != footer.bin_bytes + 4 * footer.num_documents + footer.bad_bytes + length + len(tail):
                raise RunError(f"{path}: damaged part; delete this file and start the same command again")
            return footer
    except FileNotFoundError:
        return None


def parts_of(folder: Path, task: int, first: int) -> Iterator[Footer]:
    """Footers of a task's parts from number `first`, up to the first that is missing."""
    number = first
    while (footer := read_footer(part_path(folder, task, number))) is not None:
        yield footer
        number += 1
