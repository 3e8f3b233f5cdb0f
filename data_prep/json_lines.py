"""The text of one JSON line, with little memory beyond the line and the text, however long they are."""

import io
import json
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

LARGE_LINE_BYTES = 4 << 20
"""Lines from this size on are unescaped in pieces, because a JSON parser copies them several times."""
PIECE_BYTES = 1 << 20
ESCAPED = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*+"
)
"""Whole characters of a JSON string; a surrogate pair is one, half of it is none."""


class BadDocument(Exception):
    """A document that cannot be used, with the reason."""


def line_parser(text_key: str) -> Callable[[bytes], str | bytes]:
    def parse(line: bytes) -> str | bytes:
        if len(line) > LARGE_LINE_BYTES:
            return parse_large_line(line, text_key)
        return text_of(loads(line), text_key)

    return parse


def loads(line: bytes) -> Any:
    """One JSON value. NaN and Infinity, which Python's json and pandas write, are accepted. Raises BadDocument."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b"NaN" in line or b"Infinity" in line:
            with suppress(ValueError, RecursionError):
                # Written anew and read again, because Python's parser lets half a surrogate pair pass.
                return orjson.loads(json.dumps(json.loads(line.decode("utf-8"), parse_constant=lambda name: None)))
        raise BadDocument(f"no valid JSON: {error.msg}, column {error.colno}") from None


def text_of(record: Any, text_key: str) -> str:
    if not isinstance(record, dict):
        raise BadDocument(f"a JSON {type(record).__name__} where an object is expected")
    if text_key not in record:
        raise BadDocument(f"no key '{text_key}'")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadDocument(f"'{text_key}' holds {'null' if text is None else type(text).__name__}, not a string")
    return text


def parse_large_line(line: bytes, text_key: str) -> str | bytes:
    """The text of one JSON line as UTF-8, with little memory beyond the line and the text. Raises BadDocument.

    Long strings are cut out of the line before it is parsed, and the one wanted is unescaped piece by piece.
    """
    spans = _long_strings(line)
    mark = secrets.token_hex(16)  # no text holds it
    shrunk, last = bytearray(), 0
    for number, (start, end) in enumerate(spans):
        shrunk += line[last:start] + f"{mark}{number}".encode()
        last = end
    shrunk += line[last:]
    text = text_of(loads(bytes(shrunk)), text_key)
    if not text.startswith(mark):
        return text
    try:
        return _unescape(memoryview(line)[slice(*spans[int(text.removeprefix(mark))])])
    except orjson.JSONDecodeError as error:
        raise BadDocument(f"no valid JSON: {error.msg}") from None


def _long_strings(line: bytes) -> list[tuple[int, int]]:
    """(start, end) of what lies between the quotes of each JSON string longer than PIECE_BYTES."""
    spans: list[tuple[int, int]] = []
    position = line.find(b'"')
    while position >= 0:
        start = end = position + 1
        while True:
            end = line.find(b'"', end)
            if end < 0:
                return spans
            backslashes = end - 1
            while line[backslashes] == 0x5C:
                backslashes -= 1
            if (end - 1 - backslashes) % 2 == 0:
                break
            end += 1
        if end - start > PIECE_BYTES:
            spans.append((start, end))
        position = line.find(b'"', end + 1)
    return spans


def _unescape(raw: memoryview) -> bytes:
    text, start = io.BytesIO(), 0
    while start < len(raw):
        end = _safe_cut(raw, start, min(start + PIECE_BYTES, len(raw)))
        text.write(orjson.loads(b'"' + raw[start:end] + b'"').encode())
        start = end
    return text.getvalue()


def _safe_cut(raw: memoryview, start: int, target: int) -> int:
    """The last position in (start, target] between two characters, escaped or not, and between no surrogate pair."""
    whole = ESCAPED.match(raw, start, target)
    end = whole.end() if whole else start
    while end < len(raw) and raw[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    if end <= start:
        raise BadDocument("an invalid escape sequence")
    return end
