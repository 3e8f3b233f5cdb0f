"""What `tokenize` reads: from paths, globs, folders and Hugging Face datasets to an ordered list of tasks.

A task is a piece that one worker reads from its start: a byte range of a JSON-lines file, a compressed file, a row
group, a range of rows. Their order is the order of the output, whoever works on them.
"""

import glob
import hashlib
import importlib
import os
from dataclasses import asdict, dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

from remit_megatron.errors import UserError

TASK_BYTES = 32 << 20
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz", ".ndjson.gz": "jsonl.gz", ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst", ".ndjson.zst": "jsonl.zst", ".json.zst": "jsonl.zst",
    ".parquet": "parquet", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
CARDS = ("README.md", "dataset_infos.json", "dataset_info.json")
"""What describes a dataset in its folder: no input where the folder holds data of another kind than plain text."""
WORK_SUFFIX = ".parts"
OUR_SUFFIXES = (".manifest.json", ".bad.jsonl", ".select.json")
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


def expand_inputs(names: list[str], *, text_lines: bool = False) -> list[Input]:
    """Inputs in the order given, each folder or glob sorted by path. Raises UserError for what cannot be read."""
    found: list[Input] = []
    for name in names:
        found.extend(_expand(name, text_lines))
    seen: dict[str, str] = {}
    for item in found:
        real = item.path if item.kind == "hub" else os.path.realpath(item.path)
        if real in seen:
            also = f" (also as {seen[real]})" if seen[real] != item.path else ""
            raise UserError(f"{item.path}: named twice among the inputs{also}; its documents would count twice")
        seen[real] = item.path
    return found


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


def _expand(name: str, text_lines: bool) -> list[Input]:
    if name.startswith(HUB_PREFIX):
        return [Input(name, "hub", 0, 0)]
    path = Path(name)
    if path.is_dir():
        return _expand_folder(path, text_lines)
    if path.exists():
        return [_input(path, _kind(path, text_lines))]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise UserError(
            f"{name}: no such file, folder or match; a dataset on the hub is written hf:NAME[@CONFIG][:SPLIT]"
        )
    return [item for match in matches for item in _expand(match, text_lines)]


def _expand_folder(path: Path, text_lines: bool) -> list[Input]:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: a saved dataset of several splits; name one of them: {splits}")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        files = sorted(path.glob("*.arrow"))
        stats = [file.stat() for file in files]
        return [
            Input(str(path), "arrow", sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))
        ]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) and not _is_ours_or_hidden(p, path))
    kinds = [_kind(file, text_lines) for file in files]
    if any(kind not in ("text", "lines") and file.name not in CARDS for file, kind in zip(files, kinds, strict=True)):
        kept = [file.name not in CARDS for file in files]
        files, kinds = list(compress(files, kept)), list(compress(kinds, kept))
    if not files:
        raise UserError(f"{path}: holds no file with one of the endings {', '.join(SUFFIXES)}")
    return [_input(file, kind) for file, kind in zip(files, kinds, strict=True)]


def _is_ours_or_hidden(path: Path, root: Path) -> bool:
    """What this tool wrote into the folder that it reads, and hidden files: no input."""
    if path.name.startswith(".") or any(part.endswith(WORK_SUFFIX) for part in path.relative_to(root).parts[:-1]):
        return True
    prefixes = [str(path).removesuffix(ending) for ending in OUR_SUFFIXES if path.name.endswith(ending)]
    return any(os.path.exists(f"{prefix}{ending}") for prefix in prefixes for ending in (".idx", WORK_SUFFIX))


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def _kind(path: Path, text_lines: bool) -> str:
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path}: unknown ending; known are {', '.join(SUFFIXES)}")
    kind = SUFFIXES[suffix]
    if suffix == ".json" and _is_one_value(path):
        return "json"
    return "lines" if kind == "text" and text_lines else kind


def _is_one_value(path: Path) -> bool:
    """Whether a .json file is an array, or an object over several lines, rather than an object a line."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return False  # reported where it is opened to be read
    return head.startswith(b"[") or head.split(b"\n")[0].rstrip() == b"{"


def _input(path: Path, kind: str) -> Input:
    try:
        with open(path, "rb"):
            stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return Input(str(path), kind, stat.st_size, stat.st_mtime_ns)


def _parquet_tasks(source: Input, text_key: str) -> list[Task]:
    pyarrow, pq = needed("pyarrow", source.path), needed("pyarrow.parquet", source.path)
    try:
        with pq.ParquetFile(source.path) as file:
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
    if text_key not in schema.names:
        raise UserError(f"{path}: no column '{text_key}'; name one with --text-key: {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if str(kind) not in TEXT_TYPES:
        names = ", ".join(schema.names)
        raise UserError(f"{path}: column '{text_key}' holds {kind}, not text; name another with --text-key: {names}")
