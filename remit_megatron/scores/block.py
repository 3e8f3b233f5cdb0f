"""One block of scores as a file: what it belongs to, counts, a checksum, then a row for each sample (record.py).

The checksum covers everything else in the file. Blocks of the first format name no manifest, and their checksum covers
the rows alone: whether they are those of the folder, only scoring samples again tells.
"""

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from remit_megatron.errors import RunError
from remit_megatron.ops.score_quanta import LARGEST

MAGIC, UNBOUND_MAGIC = b"RMSCORE2", b"RMSCORE1"
COUNTS = struct.Struct("<8sIQIIQQ")
HASH_BYTES = 32
HEADER_BYTES = COUNTS.size + 2 * HASH_BYTES
"""Before the rows, in what `pack` writes."""
REMEDY = "delete it and run `remit score` again"


class Block(NamedTuple):
    """A range of samples of one source."""

    source: int
    number: int
    first: int
    samples: int


class BlockHeader(NamedTuple):
    """What a block's file says before its rows."""

    magic: bytes
    source: int
    first: int
    samples: int
    """Of the file, which may be more than a reader needs."""
    length: int
    saturated: int
    """Tokens at the largest score that can be stored."""
    tokens: int
    """Unmasked tokens."""
    belongs_to: bytes | None
    """SHA-256 of what the scores depend on; see `CacheManifest.belongs_to`. None in the first format."""
    checksum: bytes
    size: int
    """Bytes before the rows."""


def pack(block: Block, rows: np.ndarray, quanta: np.ndarray, mask: np.ndarray, belongs_to: bytes) -> bytes:
    """The file of a block. rows [samples]: all that is kept; quanta [samples, s] of int32 in [0, 65535]: the label's
    scores among it; mask [samples, s], nonzero where scored."""
    saturated, tokens = int(((quanta == LARGEST) & (mask > 0)).sum()), int((mask > 0).sum())
    head = COUNTS.pack(MAGIC, block.source, block.first, *quanta.shape, saturated, tokens) + belongs_to
    payload = rows.tobytes()
    return head + hashlib.sha256(head + payload).digest() + payload


def read_header(stream: BinaryIO) -> BlockHeader:
    """From the beginning of a file. Raises struct.error where it is too short."""
    magic, source, first, samples, length, saturated, tokens = COUNTS.unpack(stream.read(COUNTS.size))
    belongs_to = None if magic == UNBOUND_MAGIC else stream.read(HASH_BYTES)
    checksum = stream.read(HASH_BYTES)
    if len(checksum) < HASH_BYTES:
        raise struct.error("the header is cut")
    counts = (source, first, samples, length, saturated, tokens)
    return BlockHeader(magic, *counts, belongs_to, checksum, stream.tell())


def check_header(path: Path, header: BlockHeader, block: Block, length: int, belongs_to: bytes) -> None:
    """Raises RunError where a file is not that of this block, or of other scores than the folder's."""
    here = (header.source, header.first, header.length)
    known = header.magic in (MAGIC, UNBOUND_MAGIC) and header.saturated <= header.tokens <= header.samples * length
    if not known or here != (block.source, block.first, length) or header.samples < block.samples:
        raise RunError(f"{path}: its header is not that of this block; {REMEDY}")
    if header.belongs_to is not None and header.belongs_to != belongs_to:
        raise RunError(
            f"{path}: its scores are of another reference, precision or dataset than manifest.json beside it says: a "
            f"block of another folder; {REMEDY}"
        )


def verified(path: Path, stream: BinaryIO, header: BlockHeader, row: np.dtype) -> np.ndarray:
    """The rows [samples], mapped, after a look at every byte. Raises RunError where one has changed."""
    count = header.samples * row.itemsize
    if os.fstat(stream.fileno()).st_size != header.size + count:
        raise RunError(f"{path}: its size is not that of its content; {REMEDY}")
    content: np.ndarray = np.memmap(stream, dtype=np.uint8, mode="r", offset=header.size, shape=(count,))
    digest = hashlib.sha256()
    if header.belongs_to is not None:
        stream.seek(0)
        digest.update(stream.read(header.size - HASH_BYTES))
    digest.update(content.data)
    if digest.digest() != header.checksum:
        raise RunError(f"{path}: its SHA-256 is not the one in its header, so it was damaged; {REMEDY}")
    return content.view(row.base).reshape(header.samples, *row.shape)
