"""Parts: the unit that survives a crash. One file each, complete or absent, written by one worker.

A part holds the ids and the document lengths of a stretch of one task, the records of what could not be read, and a
footer that says what it holds and where the next part begins. Its name orders it: task, then number within the task.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from remit_megatron.data.files import close_quietly, fsync_folder, temporary_name, writing

MAGIC = b"RMTPART2"
TRAILER = struct.Struct("<II8s")
"""Bytes of the footer, its CRC-32, MAGIC."""
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part says of itself. Layout: ids, lengths (int32), bad documents (JSON lines), footer, TRAILER."""

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
    crc32: int
    """Of everything before the footer."""

    @property
    def payload_bytes(self) -> int:
        return self.bin_bytes + 4 * self.num_documents + self.bad_bytes


class PartWriter:
    """Writes one part under a temporary name; `commit` makes it appear."""

    def __init__(self, folder: Path, task: int, number: int, dtype: np.dtype) -> None:
        self.path = part_path(folder, task, number)
        self.dtype = dtype
        self._temporary = temporary_name(self.path)
        self._crc32 = 0
        self._lengths: list[np.ndarray] = []
        self._bad: list[bytes] = []
        self.counts = {"num_tokens": 0, "num_documents": 0, "largest_id": 0, "num_empty": 0, "num_bad": 0,
                       "size": 0, "disk_bytes": 0}  # fmt: skip
        with writing(self._temporary):
            self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit or abandon

    def append_ids(self, tokens: np.ndarray, largest_id: int) -> None:
        """Add ids of the dataset's dtype."""
        self._write(tokens.view(np.uint8).data)
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
        for content in (*(lengths.tobytes() for lengths in self._lengths), bad):
            self._write(content)
        footer = Footer(
            position=position, last=last, bin_bytes=bin_bytes, bad_bytes=len(bad), crc32=self._crc32, **self.counts
        )
        raw = json.dumps(asdict(footer)).encode()
        with writing(self._temporary):
            self._file.write(raw + TRAILER.pack(len(raw), zlib.crc32(raw), MAGIC))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            fsync_folder(self.path.parent)
        return footer

    def _write(self, content: bytes | memoryview) -> None:
        with writing(self._temporary):
            self._file.write(content)
        self._crc32 = zlib.crc32(content, self._crc32)

    def abandon(self) -> None:
        """Delete the temporary file, where there still is one."""
        close_quietly(self._file)
        self._temporary.unlink(missing_ok=True)


def part_path(folder: Path, task: int, number: int) -> Path:
    return folder / f"{task:07d}-{number:05d}.part"


def read_footer(path: Path) -> Footer | None:
    """The footer of a part, None where there is no such part, or a damaged one, or one of an older version."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - TRAILER.size))
            length, crc32, magic = TRAILER.unpack(file.read())
            if magic != MAGIC or length > end - TRAILER.size:
                return None
            file.seek(end - TRAILER.size - length)
            raw = file.read(length)
        footer = Footer(**json.loads(raw)) if zlib.crc32(raw) == crc32 else None
    except (OSError, struct.error):
        return None
    return footer if footer and end == footer.payload_bytes + length + TRAILER.size else None


def is_whole(path: Path) -> bool:
    """Whether a part is as it was written, every byte of it."""
    footer = read_footer(path)
    if footer is None:
        return False
    left, crc32 = footer.payload_bytes, 0
    with open(path, "rb") as file:
        while left and (piece := file.read(min(left, COPY_BYTES))):
            crc32 = zlib.crc32(piece, crc32)
            left -= len(piece)
    return not left and crc32 == footer.crc32


def parts_of(folder: Path, task: int, first: int) -> Iterator[Footer]:
    """Footers of a task's parts from number `first`, up to the first that is missing."""
    number = first
    while (footer := read_footer(part_path(folder, task, number))) is not None:
        yield footer
        number += 1
