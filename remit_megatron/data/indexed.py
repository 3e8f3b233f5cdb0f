"""Strict reader of Megatron's indexed datasets: PREFIX.bin holds token ids, PREFIX.idx says where documents lie.

Layout of .idx, little endian: magic (9 bytes), version (u64), dtype code (u8), number of sequences n (u64), number of
document marks d (u64), sequence lengths in tokens [n] int32, byte offsets into .bin [n] int64, document marks [d] int64
(the first sequence of each document, and n at the end). Megatron trusts all of it; `open_index` trusts none.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.outside import quote

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
"""The two dtypes in which Megatron's tools store token ids; any other code is damage or another kind of data."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
UINT16_VOCABULARY = 65500
"""Megatron stores vocabularies below this size as uint16, others as int32."""
CHUNK = 1 << 20


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype that Megatron chooses for a vocabulary; every id below vocab_size fits it."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def header(dtype: np.dtype, num_sequences: int, num_marks: int) -> bytes:
    """The first HEADER_BYTES of an .idx."""
    return MAGIC + struct.pack("<QBQQ", 1, CODE_OF_DTYPE[dtype], num_sequences, num_marks)


@dataclass(frozen=True, slots=True)
class IndexedTokens:
    """An opened dataset. The arrays are memory maps and hold the files open for as long as they live."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    """Tokens of each sequence, [n] int32."""
    pointers: np.ndarray
    """Byte offset of each sequence in .bin, [n] int64."""
    marks: np.ndarray
    """First sequence of each document, then n: [documents + 1] int64."""
    tokens: np.ndarray
    """All ids, [num_tokens], uint16 or int32."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.marks) - 1

    def document(self, number: int) -> np.ndarray:
        """Ids of one document. Raises UserError for a number out of range."""
        if not 0 <= number < self.num_documents:
            raise UserError(
                f"{self.prefix}: document {number} does not exist; documents are 0 to {self.num_documents - 1}"
            )
        first, last = int(self.marks[number]), int(self.marks[number + 1])
        start = int(self.pointers[first]) // self.dtype.itemsize if first < len(self.pointers) else self.num_tokens
        return self.tokens[start : start + int(self.lengths[first:last].sum(dtype=np.int64))]


def open_index(prefix: str | Path, *, is_checked: bool = False) -> IndexedTokens:
    """Open PREFIX.bin and PREFIX.idx and check the whole structure, one pass over .idx.

    is_checked: another rank has made that pass just now; here only the sizes are compared, whatever the corpus' size.
    Raises UserError naming the file, what is wrong with it and the remedy.
    """
    idx, data = idx_path(prefix), bin_path(prefix)
    for path in (idx, data):
        if not os.path.isfile(path):  # no error for a name that is too long, nor for a folder that may not be read
            raise UserError(f"{quote(str(path))}: no such file; a dataset is a PREFIX with PREFIX.bin and PREFIX.idx")
    dtype, lengths, pointers, marks = _map_index(idx)
    if is_checked:
        total = int(pointers[-1]) // dtype.itemsize + int(lengths[-1]) if len(lengths) else 0
    else:
        total = _check_sequences(idx, lengths, pointers, dtype.itemsize)
        _check_marks(idx, marks, len(lengths))
    size = data.stat().st_size
    if size != total * dtype.itemsize:
        raise _damaged(
            data, f"{size:,} bytes, but {idx.name} describes {total:,} tokens of {dtype.itemsize} bytes = "
            f"{total * dtype.itemsize:,}"
        )  # fmt: skip
    if not total:
        raise UserError(f"{data}: holds no token; make the dataset again from an input that has text")
    tokens = np.memmap(data, dtype=dtype, mode="r").view(np.ndarray)
    return IndexedTokens(str(prefix), dtype, lengths, pointers, marks, tokens)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}; make the dataset again or copy both files again from the source")


def _map_index(idx: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    with open(idx, "rb") as file:
        dtype, num_sequences, num_marks = _read_header(idx, file)
    offsets = np.cumsum([HEADER_BYTES, 4 * num_sequences, 8 * num_sequences, 8 * num_marks])
    size = idx.stat().st_size
    if size != offsets[-1]:
        raise _damaged(
            idx,
            f"{size:,} bytes, but its header ({num_sequences:,} sequences, {num_marks:,} marks) asks for "
            f"{offsets[-1]:,}",
        )
    raw = np.memmap(idx, dtype=np.uint8, mode="r").view(np.ndarray)
    lengths = raw[offsets[0] : offsets[1]].view("<i4")
    return dtype, lengths, raw[offsets[1] : offsets[2]].view("<i8"), raw[offsets[2] : offsets[3]].view("<i8")


def _read_header(idx: Path, file: IO[bytes]) -> tuple[np.dtype, int, int]:
    raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise _damaged(idx, f"{len(raw)} bytes are too few for a header")
    if raw[:9] != MAGIC:
        raise UserError(
            f"{idx}: no index of Megatron's (it begins with {raw[:9]!r}); name the prefix of a .bin/.idx pair"
        )
    version, code, num_sequences, num_marks = struct.unpack("<QBQQ", raw[9:])
    if version != 1:
        raise UserError(f"{idx}: format version {version} is unknown, 1 is expected; make the dataset again")
    if code not in DTYPE_OF_CODE:
        raise _damaged(idx, f"dtype code {code} is not one for token ids (8: uint16, 4: int32)")
    # Python integers, so a flipped high byte of a count gives a large number here and no overflow later.
    if max(num_sequences, num_marks) > 1 << 48 or num_marks < 1:
        raise _damaged(idx, f"impossible counts ({num_sequences} sequences, {num_marks} marks)")
    return DTYPE_OF_CODE[code], num_sequences, num_marks


def _check_sequences(idx: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Every length is non-negative and every pointer is the sum of what lies before it. Returns the tokens in all."""
    total = 0
    for start in range(0, len(lengths), CHUNK):
        length = lengths[start : start + CHUNK].astype(np.int64)
        if length.min(initial=0) < 0:
            where = start + int(np.argmax(length < 0))
            raise _damaged(idx, f"sequence {where} has the length {lengths[where]}")
        ends = total + np.cumsum(length)
        expected = (ends - length) * itemsize
        wrong = expected != pointers[start : start + CHUNK]
        if wrong.any():
            first = int(np.argmax(wrong))
            raise _damaged(
                idx, f"sequence {start + first} is said to begin at byte {pointers[start + first]:,} of .bin, but the "
                f"lengths before it end at {expected[first]:,}"
            )  # fmt: skip
        total = int(ends[-1])
    return total


def _check_marks(idx: Path, marks: np.ndarray, num_sequences: int) -> None:
    if marks[0] != 0 or marks[-1] != num_sequences:
        raise _damaged(idx, f"document marks run from {marks[0]} to {marks[-1]}, 0 to {num_sequences} is expected")
    for start in range(0, len(marks) - 1, CHUNK):
        steps = np.diff(marks[start : start + CHUNK + 1])
        if steps.min() < 0:
            raise _damaged(idx, f"document mark {start + int(np.argmax(steps < 0)) + 1} is smaller than the one before")
