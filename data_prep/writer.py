"""Write Megatron's .bin/.idx, byte for byte as Megatron's IndexedDatasetBuilder does, and the manifest beside them.

Files are built in the dataset's work folder and appear complete. Memory does not grow with the number of tokens or
documents.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.work import begin, claimed, empty, is_complete, publish, write_commit
from remit_megatron.data.files import close_quietly, writing
from remit_megatron.data.indexed import dtype_for, header
from remit_megatron.data.manifest import BLOCK_BYTES, Manifest, tool_name
from remit_megatron.errors import UserError

CHUNK = 1 << 20
MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max
BATCH_DOCUMENTS = 4096
BATCH_TOKENS = 1 << 22


class BlockHasher:
    """SHA-256 of consecutive blocks of a stream of bytes."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self.finished: list[str] = []
        self._current = hashlib.sha256()
        self._filled = 0

    def update(self, content: memoryview) -> None:
        while len(content):
            part = content[: self.block_bytes - self._filled]
            self._current.update(part)
            self._filled += len(part)
            content = content[len(part) :]
            if self._filled == self.block_bytes:
                self._finish_block()

    def digests(self) -> list[str]:
        """Checksums of all blocks so far, the last one perhaps shorter."""
        return self.finished + ([self._current.hexdigest()] if self._filled else [])

    def _finish_block(self) -> None:
        self.finished.append(self._current.hexdigest())
        self._current, self._filled = hashlib.sha256(), 0


class DatasetWriter:
    """Appends arrays of ids and lengths to files in a work folder; `commit` turns them into a dataset.

    For use inside of `data_prep.work.claimed`, whose folder it takes over.
    """

    def __init__(self, prefix: str | Path, folder: Path, *, vocab_size: int, dtype: np.dtype | None = None) -> None:
        """dtype: default is Megatron's choice for the vocabulary.

        Raises UserError for a vocabulary that the format cannot hold, RunError where files cannot be written.
        """
        if not 0 < vocab_size <= np.iinfo(np.int32).max:
            raise UserError(f"vocab_size = {vocab_size} is not between 1 and {np.iinfo(np.int32).max}")
        self.prefix = str(prefix)
        self.folder = folder
        self.vocab_size = vocab_size
        self.dtype = dtype or dtype_for(vocab_size)
        self.num_tokens = 0
        self.num_documents = 0
        self.largest_id = 0
        self.hasher = BlockHasher()
        begin(folder)
        with writing(folder):
            self._bin: IO[bytes] = open(folder / "all.bin", "wb")  # noqa: SIM115 - closed by commit or abandon
            self._len: IO[bytes] = open(folder / "all.len", "wb")  # noqa: SIM115

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: their ids in one array [sum(lengths)] of any integer dtype, and their lengths [documents].

        Raises UserError for an id outside the vocabulary (nothing is stored then), RunError where the disk refuses.
        """
        assert int(lengths.sum(dtype=np.int64)) == len(tokens), "lengths do not add up to the tokens"
        largest = check_ids(tokens, self.vocab_size, self.prefix)
        if len(lengths) and int(lengths.max()) > MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"{self.prefix}: a document of {lengths.max():,} tokens; the format holds 2^31 - 1: split it"
            )
        self.append_raw(np.ascontiguousarray(tokens, dtype=self.dtype), lengths.astype("<i4"))
        self.largest_id = max(self.largest_id, largest)

    def append_raw(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add ids of the dataset's dtype that were checked before, and lengths (int32) that may belong to later ids."""
        content = tokens.view(np.uint8).data
        with writing(self.folder):
            self._bin.write(content)
            self._len.write(lengths.tobytes())
        self.hasher.update(content)
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def commit(
        self,
        *,
        eod_id: int | None = None,
        tokenizer_hash: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Manifest:
        """Make the dataset appear under its name and return its manifest. Raises UserError where there is no token."""
        if not self.num_tokens:
            self.abandon()
            raise UserError(f"{self.prefix}: no token to write: the input holds no text")
        idx = self.folder / "all.idx"
        with writing(self.folder):
            for file in (self._bin, self._len):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            idx_sha256 = write_index(idx, self.folder / "all.len", self.dtype, self.num_documents)
        manifest = Manifest(
            tool=tool_name(),
            dtype=self.dtype.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_sequences=self.num_documents,
            largest_id=self.largest_id,
            vocab_size=self.vocab_size,
            eod_id=eod_id,
            tokenizer_hash=tokenizer_hash,
            bin_bytes=self.num_tokens * self.dtype.itemsize,
            block_bytes=self.hasher.block_bytes,
            bin_sha256=self.hasher.digests(),
            idx_sha256=idx_sha256,
            provenance=provenance or {},
        )
        write_commit(self.folder, manifest)
        return publish(self.prefix, self.folder)

    def abandon(self) -> None:
        """Close, and delete what was written so far; after a commit that could not be published yet, nothing."""
        for file in (self._bin, self._len):
            close_quietly(file)
        if self.folder.exists() and not is_complete(self.folder):
            empty(self.folder)


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> int:
    """The largest id (0 for none). Raises UserError for one below 0 or not below vocab_size, before any cast."""
    if not len(tokens):
        return 0
    assert tokens.dtype.kind in "iu", f"ids are integers, not {tokens.dtype}"
    smallest = int(tokens.min()) if tokens.dtype.kind == "i" else 0
    largest = int(tokens.max())
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise UserError(
            f"{where}: token id {wrong} is outside the vocabulary of {vocab_size}: use the tokenizer it belongs to"
        )
    return largest


def write_index(path: Path, len_part: Path, dtype: np.dtype, num_documents: int) -> str:
    """Write an .idx for documents of one sequence each from their lengths on disk ([n] int32). Returns its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        put(header(dtype, num_documents, num_documents + 1))
        for lengths in _chunks(len_part):
            put(lengths.tobytes())
        end = 0
        for lengths in _chunks(len_part):
            ends = end + np.cumsum(lengths, dtype=np.int64)
            put(((ends - lengths) * dtype.itemsize).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, num_documents + 1, CHUNK):
            put(np.arange(start, min(start + CHUNK, num_documents + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(len_part: Path) -> Iterable[np.ndarray]:
    with open(len_part, "rb") as file:
        while content := file.read(4 * CHUNK):
            yield np.frombuffer(content, dtype="<i4")


def write_dataset(
    prefix: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    eod_id: int | None = None,
    append_eod: bool = True,
    tokenizer_hash: str | None = None,
    provenance: dict[str, Any] | None = None,
) -> Manifest:
    """Write a dataset from documents' ids and return its manifest. Empty documents are left out.

    With `append_eod` (which needs `eod_id`), the EOD is added after each document; without it, an `eod_id` says that
    the documents end with it already, and one that does not is refused. Raises UserError for ids outside the vocabulary
    or no token at all, RunError where the disk refuses; a dataset of that name stays as it was in both cases.
    """
    if append_eod and eod_id is None:
        raise UserError(f"{prefix}: append_eod needs eod_id")
    end = np.array([eod_id] if append_eod else [], dtype=np.int64)

    def arrays() -> Iterator[np.ndarray]:
        for number, ids in enumerate(documents):
            array = _ids(ids, f"{prefix}: document {number}")
            if len(array) and eod_id is not None and not append_eod and array[-1] != eod_id:
                raise UserError(f"{prefix}: document {number} does not end with the EOD token {eod_id}: use append_eod")
            if len(array):
                yield np.concatenate([array, end]) if append_eod else array

    with claimed(str(prefix)) as folder:
        writer = DatasetWriter(prefix, folder, vocab_size=vocab_size)
        try:
            for batch in _batches(arrays()):
                writer.append(np.concatenate(batch), np.array([len(ids) for ids in batch], dtype=np.int64))
            return writer.commit(eod_id=eod_id, tokenizer_hash=tokenizer_hash, provenance=provenance)
        finally:
            writer.abandon()


def _batches(arrays: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    size = 0
    for array in arrays:
        batch.append(array)
        size += len(array)
        if len(batch) == BATCH_DOCUMENTS or size > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids(ids: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise UserError(f"{where}: ids are a list of integers, not {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
