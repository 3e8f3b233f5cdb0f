"""What `tokenize` reads: from paths, globs, folders and Hugging Face datasets to an ordered list of tasks.

A task is a piece that one worker reads from its start: a byte range of a JSON-lines file, a compressed file, a row
group, a range of rows. Their order is the order of the output, whoever works on them.
"""

import glob
import hashlib
import importlib
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.folders import (
    NOWHERE,
    SPECIAL,
    SUFFIXES,
    UNKNOWN,
    Entry,
    check_one_split,
    is_saved_dataset,
    refuse_unread,
    suffix_of,
    walk,
)
from remit_megatron.errors import UserError
from remit_megatron.outside import quote

TASK_BYTES = 32 << 20
SMALLEST_TASK_BYTES = 1 << 20
TASKS = 64
"""Into so many pieces a smaller input is cut, so that every worker has some."""
HEAD_BYTES = 4096
ZEROS = bytes(16)
"""No text of any encoding has so many."""
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""How files of UTF-16 and UTF-32 begin."""
WHOLE_JSON_BYTES = 64 << 20
HUB_PREFIX = "hf:"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
"""Arrow's names of the types that a column of text may have; a file may hold nothing but missing values."""


@dataclass(frozen=True, slots=True)
class Input:
    """One file or dataset, with what tells whether it changed between two starts."""

    path: str
    kind: str
    """jsonl, jsonl.gz, jsonl.zst, json (one value in many lines), parquet, text, lines (text by the line), arrow (a
    saved dataset) or hub."""
    size: int
    """Bytes on disk; 0 for a dataset on the hub."""
    mtime_ns: int

    def provenance(self) -> dict[str, Any]:
        """What a manifest keeps of it: path, kind, bytes, and SHA-256 of the first and last MiB of a file."""
        record: dict[str, Any] = {"path": self.path, "kind": self.kind, "bytes": self.size}
        if os.path.isfile(self.path):
            with open(self.path, "rb") as file:
                digest = hashlib.sha256(file.read(1 << 20))
                file.seek(max(0, self.size - (1 << 20)))
                digest.update(file.read(1 << 20))
            record["first_last_mib_sha256"] = digest.hexdigest()
        return record


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of an input: [low, high) in bytes (jsonl, lines), row groups (parquet), rows (arrow) or shards (hub)."""

    source: Input
    low: int
    high: int
    size: int
    """Bytes on disk, for progress and for even shares."""

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Found:
    """What the names given led to."""

    inputs: list[Input]
    left_out: list[Entry]


def expand_inputs(names: list[str], *, text_lines: bool = False, skip_unknown: bool = False) -> Found:
    """Inputs in the order given, each folder or glob sorted by path, and what was left out on the way.

    skip_unknown: leave out what is no kind of file that is read. Raises UserError for what cannot be read.
    """
    found: list[Input] = []
    left_out: list[Entry] = []
    for name in names:
        entries = _expand(name)
        if not skip_unknown:
            refuse_unread(entries, quote(name))
        left_out.extend(entry for entry in entries if entry.left_out is not None)
        found.extend(_open(entry.path, text_lines) for entry in entries if entry.left_out is None)
    if not found:
        count = len(left_out)
        raise UserError(
            f"{', '.join(map(quote, names))}: holds no file with one of the endings {', '.join(SUFFIXES)}"
            + (f"; {count:,} left out, such as {left_out[0].path} ({left_out[0].left_out})" if count else "")
        )
    seen: dict[str, str] = {}
    for item in found:
        real = item.path if item.kind == "hub" else os.path.realpath(item.path)
        if real in seen:
            also = f" (also as {seen[real]})" if seen[real] != item.path else ""
            raise UserError(f"{item.path}: named twice among the inputs{also}; its documents would count twice")
        seen[real] = item.path
    return Found(found, left_out)


def task_size(inputs: list[Input]) -> int:
    """Bytes of a piece of a file of lines: of the input alone, so that shards and restarts cut alike."""
    total = sum(source.size for source in inputs if source.kind in ("jsonl", "lines"))
    return min(TASK_BYTES, max(SMALLEST_TASK_BYTES, total // TASKS))


def plan_tasks(inputs: list[Input], task_bytes: int, text_key: str) -> list[Task]:
    """Cut inputs into tasks, in the order of the output. Raises UserError for a file without the text column."""
    tasks: list[Task] = []
    for source in inputs:
        if source.kind in ("jsonl", "lines"):
            cuts = [*range(0, source.size, task_bytes), source.size]
            tasks.extend(Task(source, low, high, high - low) for low, high in pairwise(cuts))
        elif source.kind == "json" and source.size > WHOLE_JSON_BYTES:
            raise UserError(
                f"{source.path}: one JSON value of {source.size >> 20} MiB, and such a file is read whole: write one "
                f"object a line (jq -c '.[]' {source.path})"
            )
        elif source.kind == "parquet":
            tasks.extend(_parquet_tasks(source, text_key))
        elif source.kind == "arrow":
            tasks.extend(_arrow_tasks(source, task_bytes, text_key))
        elif source.kind == "hub":
            shards = open_hub(source.path).num_shards
            tasks.extend(Task(source, shard, shard + 1, 1) for shard in range(shards))
        else:
            tasks.append(Task(source, 0, source.size, source.size))
    return tasks


def check_unchanged(inputs: list[Input]) -> None:
    """Raise UserError where a file is no longer what it was when the run was planned."""
    for source in inputs:
        if source.kind in ("hub", "arrow"):
            continue
        try:
            stat = os.stat(source.path)
            same = (stat.st_size, stat.st_mtime_ns) == (source.size, source.mtime_ns)
        except OSError:
            same = False
        if not same:
            raise UserError(f"{source.path}: changed while it was read; delete the work folder and start again")


def take_shard(tasks: list[Task], index: int, count: int) -> list[Task]:
    """Consecutive tasks of about 1/count of the bytes, so that the shards' outputs in order are the whole output."""
    if count > len(tasks):
        raise UserError(
            f"--shard {index}/{count}: the input has only {len(tasks)} pieces; use {len(tasks)} shards or fewer"
        )
    total = sum(task.size for task in tasks)
    shares: list[list[Task]] = [[] for _ in range(count)]
    before, current = 0, 0
    for position, task in enumerate(tasks):
        left = len(tasks) - position
        # The next shard begins at its share of the bytes, or when every remaining shard needs one of the tasks left.
        if shares[current] and current < count - 1 and (
            before * count >= total * (current + 1) or left == count - 1 - current
        ):  # fmt: skip
            current += 1
        shares[current].append(task)
        before += task.size
    return shares[index]


def needed(module: str, name: str) -> Any:
    """Import what an input of some kinds needs. Raises UserError naming the input where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        extra = "pip install 'remit-megatron[data]'"
        raise UserError(f"{name}: reading it needs the package {module.split('.')[0]}: {extra}") from None


def open_hub(name: str) -> Any:
    """A streamed dataset from `hf:NAME[@CONFIG][:SPLIT]`; NAME may be a local folder of data files."""
    datasets = needed("datasets", name)
    body = name.removeprefix(HUB_PREFIX)
    body, _, split = body.partition(":")
    body, _, config = body.partition("@")
    try:
        return datasets.load_dataset(body, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: the dataset cannot be opened: {str(error).splitlines()[0]}") from None


def _expand(name: str) -> list[Entry]:
    """The files that a name stands for, by path; a dataset on the hub stands for itself."""
    if name.startswith(HUB_PREFIX):
        return [Entry(Path(name))]
    path = Path(name)
    try:
        if not path.exists():
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise UserError(
                    f"{quote(name)}: no such file, folder or match; a dataset on the hub is written "
                    "hf:NAME[@CONFIG][:SPLIT]"
                )
            return [
                entry
                for match in matches
                for entry in (_expand(match) if os.path.exists(match) else [Entry(Path(match), NOWHERE)])
            ]
    except (OSError, ValueError) as error:
        raise UserError(f"{quote(name)}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not path.is_dir():
        return [Entry(path, None if path.is_file() and suffix_of(path) else UNKNOWN if path.is_file() else SPECIAL)]
    check_one_split(path)
    return [Entry(path)] if is_saved_dataset(path) else walk(path)


def _open(path: Path, text_lines: bool) -> Input:
    """An input of what is known to be there. Raises UserError where it cannot be opened or is no UTF-8."""
    if str(path).startswith(HUB_PREFIX):
        return Input(str(path), "hub", 0, 0)
    if path.is_dir():
        stats = [file.stat() for file in sorted(path.glob("*.arrow"))]
        newest = max((s.st_mtime_ns for s in stats), default=0)
        return Input(str(path), "arrow", sum(s.st_size for s in stats), newest)
    try:
        with open(path, "rb") as file:
            stat, head = os.fstat(file.fileno()), file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    kind = SUFFIXES[suffix_of(path) or ""]
    if kind in ("jsonl", "text") and (head.startswith(WIDE_MARKS) or (len(head) > 3 and 3 * head.count(0) > len(head))):
        if ZEROS in head:
            raise UserError(
                f"{path}: holds a run of zero bytes, as a crash of a machine leaves it: copy the file again, or leave "
                "it out"
            )
        raise UserError(
            f"{path}: UTF-16 or UTF-32, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8 {path}), or leave it out"
        )
    if kind.endswith((".gz", ".zst")) and not head:
        raise UserError(f"{path}: an archive of 0 bytes, so it was cut or never written: replace it, or leave it out")
    if kind == "jsonl" and path.name.lower().endswith(".json") and _is_one_value(head):
        kind = "json"
    return Input(str(path), "lines" if kind == "text" and text_lines else kind, stat.st_size, stat.st_mtime_ns)


def _is_one_value(head: bytes) -> bool:
    """Whether a .json file is an array, or an object over several lines, rather than an object a line."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[") or head.split(b"\n")[0].rstrip() == b"{"


def _parquet_tasks(source: Input, text_key: str) -> list[Task]:
    pyarrow, pq = needed("pyarrow", source.path), needed("pyarrow.parquet", source.path)
    try:
        with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source.path}: no valid parquet file: {str(error).splitlines()[0]}") from None
    _check_column(source.path, schema, text_key)
    scale = source.size / max(1, sum(sizes))  # row groups are sized uncompressed
    return [Task(source, group, group + 1, max(1, round(size * scale))) for group, size in enumerate(sizes)]


def _arrow_tasks(source: Input, task_bytes: int, text_key: str) -> list[Task]:
    try:
        dataset = needed("datasets", source.path).load_from_disk(source.path)
    except (OSError, ValueError, IndexError) as error:  # IndexError: saved without a row, so without a file
        raise UserError(f"{source.path}: the saved dataset cannot be opened or is empty: {error}") from None
    _check_column(source.path, dataset.features.arrow_schema, text_key)
    rows = max(1, len(dataset) * task_bytes // max(1, source.size))
    cuts = [*range(0, len(dataset), rows), len(dataset)]
    per_row = source.size / max(1, len(dataset))
    return [Task(source, low, high, round((high - low) * per_row)) for low, high in pairwise(cuts)]


def _check_column(path: str, schema: Any, text_key: str) -> None:
    """Raise UserError where an Arrow schema has no such column, or one that holds no text."""
    if schema.names.count(text_key) > 1:
        raise UserError(f"{path}: {schema.names.count(text_key)} columns are called '{text_key}': rename all but one")
    if text_key not in schema.names:
        raise UserError(f"{path}: no column '{text_key}'; name one with --text-key: {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if str(kind) not in TEXT_TYPES:
        names = ", ".join(schema.names)
        raise UserError(f"{path}: column '{text_key}' holds {kind}, not text; name another with --text-key: {names}")
