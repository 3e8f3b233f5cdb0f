"""One worker: reads a task from wherever it stands, encodes it and writes parts. It shares nothing but the disk."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.backends import (
    LARGE_BYTES,
    Backend,
    HuggingFace,
    TokenizerFile,
    clip,
    describe_difference,
    holder,
    limit_threads,
    open_backend,
)
from data_prep.cuts import HF_PIECE_BYTES, PIECE_BYTES, pieces, safe_to_cut
from data_prep.inputs import Task
from data_prep.parts import PartWriter, parts_of
from data_prep.readers import Batch, read_task
from data_prep.writer import MAX_DOCUMENT_TOKENS, check_ids
from remit_megatron.data.indexed import dtype_for
from remit_megatron.errors import RemitError, RunError, UserError

PART_BYTES = 32 << 20
WRITE_IDS = 1 << 20
CHECK_EVERY = 2000
"""One document in so many is encoded by `tokenizers` too where gigatoken does the work."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run knows."""

    folder: Path
    tokenizer: TokenizerFile
    backend: str
    vocab_size: int
    eod_id: int | None
    text_key: str
    max_document_bytes: int
    max_bad: int
    part_bytes: int = PART_BYTES
    exact: str = ""
    """Characters that make a text one for `tokenizers`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a worker did since it last said so."""

    size: int
    """Bytes of text."""
    disk_bytes: int
    tokens: int


class Encoder:
    """Texts to ids with the end of document in place, checked against `tokenizers` now and then."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.backend: Backend = open_backend(job.backend, job.tokenizer)
        self.reference = HuggingFace(job.tokenizer) if job.backend != HuggingFace.name else None
        self.dtype = dtype_for(job.vocab_size)
        self.cuts = safe_to_cut(job.tokenizer, self.backend)
        self._is_exact = holder(job.exact)
        self._documents = 0

    def encode(self, texts: list[str | bytes]) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids in the dataset's dtype, lengths of the documents that have ids, largest id).

        Raises UserError for an id outside the vocabulary, RunError for one that differs from that of `tokenizers`.
        """
        ids, lengths = self._encode(texts)
        self._check(texts)
        largest = check_ids(ids, self.job.vocab_size, str(self.job.tokenizer.path))
        lengths = lengths[lengths > 0]  # a normalizer may leave nothing of a text
        if self.job.eod_id is None:
            return ids.astype(self.dtype), lengths, largest
        return *append_eod(ids, lengths, self.job.eod_id, self.dtype), max(largest, self.job.eod_id)

    def encode_large(self, text: bytes, write: Callable[[np.ndarray, int], None]) -> int:
        """Write one document's ids piece by piece with `write(ids, largest id)`. Returns its length, 0 for no ids."""
        self._check([text])
        length = 0
        size = HF_PIECE_BYTES if self.backend.name == HuggingFace.name else PIECE_BYTES
        for piece in pieces(text, size) if self.cuts else (text,):
            ids, _ = self._encode([piece])
            largest = check_ids(ids, self.job.vocab_size, str(self.job.tokenizer.path))
            for start in range(0, len(ids), WRITE_IDS):
                write(ids[start : start + WRITE_IDS].astype(self.dtype), largest)
            length += len(ids)
        if length and self.job.eod_id is not None:
            write(np.array([self.job.eod_id], dtype=self.dtype), self.job.eod_id)
            length += 1
        if length > MAX_DOCUMENT_TOKENS:
            raise UserError(f"a document of {length:,} tokens; the format holds 2^31 - 1: lower --max-document-mib")
        return length

    def _encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths in order, as of Backend, of some texts by the reference."""
        if self.reference is None or not any(map(self._is_exact, texts)):
            return self.backend.encode(texts)
        found = [
            (self.reference if is_exact else self.backend).encode(list(group))
            for is_exact, group in groupby(texts, self._is_exact)
        ]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([lengths for _, lengths in found])

    def _check(self, texts: list[str | bytes]) -> None:
        first = -self._documents % CHECK_EVERY
        self._documents += len(texts)
        if self.reference is None:
            return
        for text in texts[first::CHECK_EVERY]:
            sample = clip(text)
            got, expected = self._encode([sample])[0], self.reference.encode([sample])[0]
            if not np.array_equal(got, expected):
                raise RunError(
                    f"{describe_difference(sample, got, expected)}: delete {self.job.folder} and start again with "
                    "--backend tokenizers"
                )


def append_eod(ids: np.ndarray, lengths: np.ndarray, eod_id: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Put an EOD after each document, without a loop over documents. Ids must fit the dtype."""
    lengths = lengths + 1
    tokens = np.full(len(ids) + len(lengths), eod_id, dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[np.cumsum(lengths) - 1] = False
    tokens[is_text] = ids
    return tokens, lengths


def run_task(
    job: Job,
    encoder: Encoder,
    number: int,
    task: Task,
    resume: tuple[int, int | None],
    report: Callable[[Progress], None],
) -> None:
    """Write the parts of a task that are missing. `resume`: (number of the first part to look for, its position)."""
    part, position = resume
    for footer in parts_of(job.folder, number, part):
        part, position = part + 1, footer.position
        if footer.last:
            return
    batches = read_task(task, position, job.text_key, job.max_document_bytes)
    at = position
    more = True
    while more:
        writer = PartWriter(job.folder, number, part, encoder.dtype)
        try:
            at, more = _fill(job, encoder, writer, batches, at, report)
            writer.commit(at if at is not None else 0, last=not more)
        finally:
            writer.abandon()
        part += 1


def _fill(
    job: Job,
    encoder: Encoder,
    writer: PartWriter,
    batches: Iterator[Batch],
    at: int | None,
    report: Callable[[Progress], None],
) -> tuple[int | None, bool]:
    """Move batches into a part until it is full. Returns (position after them, whether more may come)."""
    for batch in batches:
        before = writer.counts["num_tokens"]
        for texts in _groups(batch.texts):
            count = len(texts)
            if len(texts[0]) >= LARGE_BYTES:
                text = texts.pop()
                length = encoder.encode_large(text.encode() if isinstance(text, str) else text, writer.append_ids)
                lengths = np.array([length] if length else [], dtype=np.int64)
            else:
                ids, lengths, largest = encoder.encode(texts)
                writer.append_ids(ids, largest)
            batch.empty += count - len(lengths)
            writer.append_lengths(lengths)
        at = batch.position
        writer.passed(empty=batch.empty, bad=batch.bad, size=batch.size, disk_bytes=batch.disk_bytes)
        if writer.counts["num_bad"] > job.max_bad:
            raise too_many_bad(writer.counts["num_bad"], job.max_bad, batch.bad[-1])
        report(Progress(batch.size, batch.disk_bytes, writer.counts["num_tokens"] - before))
        if writer.counts["size"] >= job.part_bytes:
            return at, True
    return at, False


def _groups(texts: list[str | bytes]) -> Iterator[list[str | bytes]]:
    """Large texts alone, so that no batch holds several; the list is emptied to free each one as it is done."""
    if max(map(len, texts), default=0) < LARGE_BYTES:
        if texts:
            yield texts
        return
    group: list[str | bytes] = []
    texts.reverse()
    while texts:
        text = texts.pop()
        if len(text) >= LARGE_BYTES:
            if group:
                yield group
                group = []
            yield [text]
        else:
            group.append(text)
    if group:
        yield group


def too_many_bad(found: int, allowed: int, example: dict[str, Any]) -> UserError:
    return UserError(
        f"{example['file']}: {found} documents could not be read, --max-bad allows {allowed}; for example "
        f"{describe_bad(example)}; correct the input or raise --max-bad"
    )


def describe_bad(record: dict[str, Any]) -> str:
    """Where a document that was put aside begins, and why it was."""
    where = f"byte {record['byte']}" if "byte" in record else f"row {record['row']}"
    return f"at {where}: {record['reason']}"


def worker_main(job: Job, tasks: list[Task], pipe: Connection) -> None:
    """A worker process: takes (task number, resume) from the pipe, answers with Progress, then "done" or an error.

    It ends when the pipe closes, so that no worker outlives a parent that was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    limit_threads()
    parent = os.getppid()

    def report(progress: Progress) -> None:
        if os.getppid() != parent:
            os._exit(1)
        pipe.send(progress)

    try:
        encoder = Encoder(job)
        while True:
            pipe.send("ready")
            number, resume = pipe.recv()
            run_task(job, encoder, number, tasks[number], resume, report)
    except EOFError:
        return
    except BrokenPipeError:
        return
    except RemitError as error:
        _tell(pipe, (type(error), str(error)))
    except MemoryError:
        _tell(pipe, (RunError, "a worker ran out of memory: use fewer --workers or a smaller --max-document-mib"))


def _tell(pipe: Connection, message: tuple[type[RemitError], str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.send(message)
