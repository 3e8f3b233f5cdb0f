"""Texts of every kind that `remit data tokenize` reads.

The judge has readers of its own: Python's `json`, `gzip` and `zstandard` whole in memory, and pyarrow of the whole
table. What was accepted must be what these find, document by document, with the bad ones counted.
"""

import gzip
import json
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer

import data_prep.tokenize  # noqa: F401 - here, and so by no fork
from tests.data_prep.tokenizers import TEXTS, save
from tests.fuzz.framework import Target, register

MAX_BAD = 5
COMMAND = ("data", "tokenize", "--tokenizer", "tokenizer", "--output", "out/data", "--workers", "1", "--max-bad",
           str(MAX_BAD), "--backend", "tokenizers")  # fmt: skip


def documents() -> list[str]:
    generator = random.Random(0)
    return [f"{number} " + "".join(generator.choices(TEXTS, k=2)) for number in range(12)]


def lines() -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(documents()))


def as_parquet(path: Path) -> None:
    table = pyarrow.table({"id": list(range(12)), "text": documents()})
    pyarrow.parquet.write_table(table, path, row_group_size=5, write_page_checksum=True)


WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: path.write_bytes(lines()),
    "jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(), mtime=0)),
    "jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines())),
    "json": lambda path: path.write_text(json.dumps([{"text": text} for text in documents()], indent=1)),
    "parquet": as_parquet,
    "txt": lambda path: path.write_text("\n".join(documents()), encoding="utf-8"),
}


def prepare(kind: str, folder: Path) -> None:
    save("gpt2", folder / "tokenizer")
    (folder / "in").mkdir()
    WRITERS[kind](folder / "in" / f"a.{kind}")


def expected(kind: str, path: Path) -> list[str] | None:
    """Texts of the file by another way. None: there is none, or as many are bad as must not pass."""
    raw = path.read_bytes()
    try:
        if kind == "jsonl.gz":
            raw = gzip.decompress(raw)
        elif kind == "jsonl.zst":
            raw = b"".join(iter(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read, b""))
    except (OSError, EOFError, ValueError, zstandard.ZstdError, struct.error) as error:
        raise AssertionError(f"accepted, but it cannot be unpacked: {error}") from None
    if kind == "parquet":
        column = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read(["text"]).column("text")
        return [value.decode() for value in column.cast(pyarrow.large_binary()).to_pylist() if value]
    if kind == "txt":
        return [raw.removeprefix(b"\xef\xbb\xbf").decode()]
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if kind == "json" and raw.lstrip()[:1] in (b"[", b"{") and not _is_lines(raw):
        return [value["text"] for value in _values(json.loads(raw)) if _is_text(value)]
    texts = []
    for line in raw.split(b"\n"):
        try:
            value = json.loads(line.decode("utf-8"), parse_int=lambda text: 0)
        except (ValueError, RecursionError):
            continue
        if _is_text(value):
            texts.append(value["text"])
    return texts


def _is_lines(raw: bytes) -> bool:
    return raw.startswith(b"{") and raw.split(b"\n")[0].rstrip() != b"{"


def _values(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _is_text(value: object) -> bool:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        return False
    return not any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(value, ensure_ascii=False))


def judge(kind: str, folder: Path, valid: Path) -> str | None:
    try:
        texts = expected(kind, folder / "in" / f"a.{kind}")
    except AssertionError as error:
        return str(error)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts or []]
    wanted = [np.array(one) for one in ids if one]
    found = np.fromfile(folder / "out" / "data.bin", dtype=np.uint16)
    if not np.array_equal(found, np.concatenate(wanted) if wanted else []):
        return "accepted, but its tokens are not those of the texts in it"
    sequences = int.from_bytes((folder / "out" / "data.idx").read_bytes()[18:26], "little")
    return None if sequences == len(wanted) else f"{sequences} documents, but it holds {len(wanted)}"


for kind in WRITERS:
    register(
        Target(
            name=f"corpus.{kind}",
            prepare=partial(prepare, kind),
            files=("in/*",),
            command=("data", "tokenize", "in", *COMMAND[2:]),
            judge=partial(judge, kind),
            kept=("tokenizer/*",),
            share=0.25 if kind in ("json", "jsonl", "txt") else 1.0,
        )
    )
