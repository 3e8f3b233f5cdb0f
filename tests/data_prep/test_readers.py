"""Long lines, unescaped in pieces, and cuts of compressed files."""

import json
import random
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import json_lines
from data_prep.json_lines import BadDocument, parse_large_line
from data_prep.readers import UNBROKEN, Batch, _check_zstd, rows_at_once

PIECES = (
    "a",
    "word ",
    '"',
    "\\",
    "\\\\",
    "\n",
    "\t",
    "\u0301",
    "\u4e2d",
    "\U0001f600",
    "\x01",
    "/",
    "{",
    "}",
    "\u2028",
)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    other=st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    ascii_only=st.booleans(),
    piece=st.integers(13, 40),
)
def test_large_line_equals_the_parser(text: str, other: str, ascii_only: bool, piece: int) -> None:
    """With pieces of a few bytes, cuts fall next to every kind of escape, surrogate pairs among them."""
    line = json.dumps(
        {"o": other, "n": [1, {"text": other}], "text": text, "z": text}, ensure_ascii=ascii_only
    ).encode()
    before, json_lines.PIECE_BYTES = json_lines.PIECE_BYTES, piece
    try:
        found = parse_large_line(line + b"\n", "text")
    finally:
        json_lines.PIECE_BYTES = before
    assert (found.decode() if isinstance(found, bytes) else found) == orjson.loads(line)["text"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b"x" * 100,
        b'{"text": "' + b"x" * 100 + b'"',
        b'{"text": "' + b"x" * 50 + b"\xff" + b"x" * 50 + b'"}',
        b'{"text": "' + b"x" * 50 + b"\\ud800" + b"x" * 50 + b'"}',
        b'{"text": "' + b"x" * 50 + b"\n" + b"x" * 50 + b'"}',
        b'{"text": "' + b"x" * 50 + b"\\q" + b"x" * 50 + b'"}',
        b'{"text": "' + b"\\u12" * 30 + b'"}',
        b'{"other": "' + b"x" * 100 + b'"}',
        b'{"text": ["' + b"x" * 100 + b'"]}',
    ],
)
def test_large_bad_line(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 20)
    with pytest.raises(BadDocument):
        parse_large_line(line, "text")


def test_cut_zstd(tmp_path: Path) -> None:
    """The library itself reads a cut file to where it ends and says nothing."""
    path = tmp_path / "a.zst"
    for checksum in (False, True):
        frame = zstandard.ZstdCompressor(write_checksum=checksum).compress(
            random.Random(0).randbytes(300_000) + bytes(10**6)
        )
        skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
        path.write_bytes(frame + skippable + frame)
        _check_zstd(str(path))
        for cut in (1, 2, 5, 100, 140_000, len(frame) - 2):
            path.write_bytes((frame + skippable + frame)[:-cut])
            with pytest.raises((EOFError, zstandard.ZstdError)):
                _check_zstd(str(path))


@pytest.mark.parametrize("line", [b'{"a": NaN, "text": "x"}', b'{"a": [-Infinity, Infinity], "text": "x"}'])
def test_constants_that_python_writes(line: bytes) -> None:
    parse = json_lines.line_parser("text")
    assert parse(line) == "x"
    for bad in (line.replace(b"x", b"\\ud800"), line.replace(b"x", b"\xff"), line.replace(b'"}', b'"'), b"NaN"):
        with pytest.raises(BadDocument):
            parse(bad)


@pytest.mark.parametrize("unit", [" ", "a", "\u4e00", "7", "=", "\n"])
def test_endless_words_are_put_aside(unit: str) -> None:
    """Wherever the run begins; a run of a million is text."""
    batch = Batch(0)
    run = unit * (2 * UNBROKEN)
    for text in (run, "some words " * 7 + run, run + " and more", f"x {run}x"):
        for form in (text, text.encode()):
            if unit == "\u4e00" and isinstance(form, bytes):
                continue  # a third as many characters as bytes
            with pytest.raises(BadDocument, match="characters of one kind"):
                batch.add(form)
    for text in (unit * 1_000_000, "some words, " * (UNBROKEN // 4), ("b3+/" * 20 + "\n") * (UNBROKEN // 20)):
        batch.add(text)
    assert (len(batch.texts), batch.empty) == (3, 0)


def test_rows_at_once() -> None:
    """About 4 MiB, whatever a row holds."""
    assert rows_at_once(1 << 30, 1 << 20) == 1024
    assert rows_at_once(1 << 30, 16 * 64) == 4
    assert rows_at_once(1 << 30, 3) == 1
    assert rows_at_once(0, 0) == 1
