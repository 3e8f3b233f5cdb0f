"""Documents of a task, in batches, from any position of it, in memory bounded by the longest document allowed."""

import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from data_prep.inputs import Task, open_hub
from data_prep.json_lines import BadDocument, line_parser, loads, text_of
from remit_megatron.errors import UserError

BATCH_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
EXCERPT_BYTES = 400
UNBROKEN = 1 << 21
"""Letters, digits, marks or white space without an end, in characters: tokenizers take such a run as one word, and need
dozens of bytes for each of its characters. A run of twice the length is found wherever it begins."""
MARKS = re.compile(r"[^\w\s]*")
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Batch:
    """Documents with text in order, records of those that could not be read, and where to go on."""

    position: int
    """Where the next document begins, in the units of the reader."""
    texts: list[str | bytes] = field(default_factory=list)
    """Non-empty texts; bytes are valid UTF-8."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    empty: int = 0
    size: int = 0
    """Bytes of text read, blank lines and bad ones included."""
    disk_bytes: int = 0
    """Bytes of the file on disk that this batch passed, for progress."""

    def add(self, text: str | bytes) -> None:
        """Count a document. Raises BadDocument for one that no tokenizer can split."""
        if len(text) >= 2 * UNBROKEN:
            _refuse_unbroken(text)
        if text:
            self.texts.append(text)
        else:
            self.empty += 1


def read_task(task: Task, start: int | None, text_key: str, max_bytes: int) -> Iterator[Batch]:
    """Batches of a task's documents from position `start` (none: from its beginning)."""
    kind = task.source.kind
    if kind in ("jsonl", "lines"):
        parse = line_parser(text_key) if kind == "jsonl" else _plain_line
        yield from _read_lines(task, start, parse, max_bytes)
    elif kind in ("jsonl.gz", "jsonl.zst"):
        yield from _read_compressed(task, start, text_key, max_bytes)
    elif kind == "text":
        yield from _read_text_file(task, start, max_bytes)
    else:
        rows = {"parquet": _parquet_rows, "arrow": _arrow_rows, "hub": _hub_rows, "json": _json_rows}[kind]
        yield from _read_rows(task, rows(task, start or 0, text_key), start or 0, max_bytes)


def _bad(task: Task, position: int, reason: str, raw: bytes) -> dict[str, Any]:
    excerpt = raw[:EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
    where = "byte" if task.source.kind.split(".")[0] in ("jsonl", "lines", "text") else "row"
    record: dict[str, Any] = {"file": task.source.path, where: position}
    if where == "row":
        record["piece"] = task.low
    return {**record, "reason": reason, "excerpt": excerpt}


def _refuse_unbroken(text: str | bytes) -> None:
    for start in range(0, len(text) - UNBROKEN + 1, UNBROKEN):
        part = text[start : start + UNBROKEN]
        window = part if isinstance(part, str) else part.decode(errors="ignore")
        if window.isalpha() or window.isspace() or window.isnumeric() or MARKS.fullmatch(window):
            raise BadDocument(f"a run of over {len(window):,} characters of one kind, which is no text")


# Lines


def _read_lines(
    task: Task, start: int | None, parse: Callable[[bytes], str | bytes], max_bytes: int
) -> Iterator[Batch]:
    """Lines that begin in [low, high)."""
    with open(task.source.path, "rb", buffering=1 << 20) as file:
        if start is None:
            # From the byte before `low`: a line that begins exactly at `low` is ours, one that began earlier is not.
            file.seek(max(task.low - 1, 0))
            if task.low:
                _skip_line(file)
        else:
            file.seek(start)
        position = file.tell()
        before = position
        for batch in _lines(task, file, position, task.high, parse, max_bytes):
            batch.disk_bytes, before = batch.position - before, batch.position
            yield batch


def _read_compressed(task: Task, start: int | None, text_key: str, max_bytes: int) -> Iterator[Batch]:
    """All lines of a compressed file; positions are offsets in what it decompresses to."""
    with open(task.source.path, "rb") as raw:
        try:
            if task.source.kind.endswith(".zst"):
                _check_zstd(task.source.path)
            with _decompressed(raw, task.source.kind) as file:
                position = 0
                while position < (start or 0):
                    position += len(file.read(min(1 << 20, (start or 0) - position)))
                before = 0
                for batch in _lines(task, file, position, None, line_parser(text_key), max_bytes):
                    batch.disk_bytes, before = raw.tell() - before, raw.tell()
                    yield batch
        except (EOFError, OSError, zlib.error, _zstd_error()) as error:
            raise UserError(
                f"{task.source.path}: damaged or cut short ({error}); replace it, or leave it out"
            ) from None


def _decompressed(raw: IO[bytes], kind: str) -> IO[bytes]:
    if kind.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 20)  # type: ignore[arg-type]
    import zstandard

    # As `zstd --long=31` writes them; memory grows with the window that a frame asks for.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    reader = decompressor.stream_reader(raw, read_across_frames=True, read_size=1 << 20)
    return io.BufferedReader(reader, 1 << 20)  # type: ignore[arg-type]


def _check_zstd(path: str) -> None:
    """Raise EOFError where a .zst ends inside a frame: the library would give what there is and say nothing.

    Reads the block headers only. Format: RFC 8878, section 3.1.
    """
    import zstandard

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while file.tell() < size:
            start = file.tell()
            head = file.read(18)
            magic = int.from_bytes(head[:4], "little")
            if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame to skip
                file.seek(start + 8 + int.from_bytes(head[4:8], "little"))
                continue
            parameters = zstandard.get_frame_parameters(head)
            file.seek(start + zstandard.frame_header_size(head))
            last = False
            while not last:
                raw = file.read(3)
                if len(raw) < 3:
                    raise EOFError("it ends inside a frame")
                header = int.from_bytes(raw, "little")
                last = bool(header & 1)
                file.seek(1 if header >> 1 & 3 == 1 else header >> 3, os.SEEK_CUR)
            file.seek(4 * parameters.has_checksum, os.SEEK_CUR)
        if file.tell() > size:
            raise EOFError("it ends inside a frame")


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _skip_line(file: IO[bytes]) -> None:
    while (piece := file.readline(PIECE_BYTES)) and not piece.endswith(b"\n"):
        continue


def _lines(
    task: Task,
    file: IO[bytes],
    position: int,
    end: int | None,
    parse: Callable[[bytes], str | bytes],
    max_bytes: int,
) -> Iterator[Batch]:
    batch, batch_start = Batch(position), position
    while end is None or position < end:
        line = file.readline(max_bytes + 1)
        if not line:
            break
        here = position
        position += len(line)
        if len(line) > max_bytes:
            start = line[:EXCERPT_BYTES]
            length = _rest_of_line(file, max_bytes + 1)
            position = here + length
            batch.bad.append(_bad(task, here, f"longer than {max_bytes:,} bytes ({length:,})", start))
        else:
            if here == 0 and line.startswith(BOM):
                line = line[len(BOM) :]
            if not line.isspace() and line:
                try:
                    batch.add(parse(line))
                except BadDocument as error:
                    batch.bad.append(_bad(task, here, str(error), line))
        del line  # it may be the longest thing in memory while the batch is encoded
        if position - batch_start >= BATCH_BYTES:
            batch.position, batch.size = position, position - batch_start
            yield batch
            batch, batch_start = Batch(position), position
    batch.position, batch.size = position, position - batch_start
    yield batch


def _rest_of_line(file: IO[bytes], length: int) -> int:
    """Read to the end of a line of which `length` bytes were read. Returns its whole length."""
    while piece := file.readline(PIECE_BYTES):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    return length


def _plain_line(line: bytes) -> str:
    try:
        return line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(f"invalid UTF-8 at byte {error.start} of the line") from None


# Whole files and tables


def _read_text_file(task: Task, start: int | None, max_bytes: int) -> Iterator[Batch]:
    size = task.source.size
    batch = Batch(position=size, size=size, disk_bytes=size)
    if start is None:
        with open(task.source.path, "rb") as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            batch.bad.append(_bad(task, 0, f"longer than {max_bytes:,} bytes ({size:,})", raw))
        else:
            raw = raw.removeprefix(BOM)
            try:
                batch.add(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                batch.bad.append(_bad(task, 0, f"invalid UTF-8 at byte {error.start}", raw))
            except BadDocument as error:
                batch.bad.append(_bad(task, 0, str(error), raw))
    yield batch


def _read_rows(task: Task, rows: Iterator[Any], start: int, max_bytes: int) -> Iterator[Batch]:
    """Batches of a column's values; positions are rows of the task."""
    batch = Batch(start)
    for number, value in enumerate(rows, start):
        raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if isinstance(raw, BadDocument):
            batch.bad.append(_bad(task, number, str(raw), b""))
        elif not isinstance(raw, bytes):
            batch.bad.append(
                _bad(task, number, f"{'null' if value is None else type(value).__name__}, not a string", b"")
            )
        elif len(raw) > max_bytes:
            batch.bad.append(_bad(task, number, f"longer than {max_bytes:,} bytes ({len(raw):,})", raw))
        else:
            try:
                raw.decode("utf-8")
                batch.add(raw)
            except UnicodeDecodeError as error:
                batch.bad.append(_bad(task, number, f"invalid UTF-8 at byte {error.start}", raw))
            except BadDocument as error:
                batch.bad.append(_bad(task, number, str(error), raw))
            batch.size += len(raw)
        batch.position = number + 1
        if batch.size >= BATCH_BYTES:
            yield batch
            batch = Batch(number + 1)
    yield batch


def _parquet_rows(task: Task, start: int, text_key: str) -> Iterator[Any]:
    import pyarrow  # planning made sure of it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(task.source.path, buffer_size=1 << 20, page_checksum_verification=True) as file:
            group, row = file.metadata.row_group(task.low), 0
            size = rows_at_once(group.total_byte_size, group.num_rows)
            for table in file.iter_batches(size, row_groups=[task.low], columns=[text_key]):
                row += len(table)
                if row > start:
                    yield from _values(table.column(0))[max(0, start - (row - len(table))) :]
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).splitlines()[0]
        raise UserError(
            f"{task.source.path}: row group {task.low} is damaged ({what}); replace it, or leave it out"
        ) from None


def rows_at_once(size: int, rows: int) -> int:
    """How many of `rows` rows with `size` bytes in all to decode together, about BATCH_BYTES."""
    return max(1, min(1024, BATCH_BYTES * rows // max(1, size)))


def _values(column: Any) -> list[Any]:
    """A column's texts as bytes (None: missing); one invalid value must not spoil its batch, as str would."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


def _arrow_rows(task: Task, start: int, text_key: str) -> Iterator[Any]:
    import datasets

    dataset = datasets.load_from_disk(task.source.path).select_columns(text_key)
    size = rows_at_once(task.size, task.high - task.low)
    for low in range(task.low + start, task.high, size):
        yield from dataset[low : min(low + size, task.high)][text_key]


def _json_rows(task: Task, start: int, text_key: str) -> Iterator[Any]:
    """The objects of a file that is one JSON array, or one object written over many lines."""
    with open(task.source.path, "rb") as file:
        try:
            value = loads(file.read().removeprefix(BOM))
        except BadDocument as error:
            raise UserError(f"{task.source.path}: {error}; write one JSON object a line") from None
    for record in (value if isinstance(value, list) else [value])[start:]:
        try:
            yield text_of(record, text_key)
        except BadDocument as error:
            yield error


def _hub_rows(task: Task, start: int, text_key: str) -> Iterator[Any]:
    dataset = open_hub(task.source.path)
    shard = dataset.shard(num_shards=dataset.num_shards, index=task.low)
    for number, row in enumerate(shard.skip(start) if start else shard):
        if number == 0 and text_key not in row:
            raise UserError(f"{task.source.path}: no column '{text_key}'; name one with --text-key: {', '.join(row)}")
        yield row[text_key]
