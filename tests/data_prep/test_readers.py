"""Long lines, unescaped in pieces, and cuts of compressed files."""

import json
import random
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import readers
from data_prep.readers import BadDocument, _check_zstd, parse_large_line

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
    before, readers.PIECE_BYTES = readers.PIECE_BYTES, piece
    try:
        found = parse_large_line(line + b"\n", "text")
    finally:
        readers.PIECE_BYTES = before
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
    monkeypatch.setattr(readers, "PIECE_BYTES", 20)
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
