"""Ways to break the content of a file: bytes, and the values of JSON and TOML."""

import json
import random
import struct
import tomllib
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.0, 1e308, float("inf"), float("nan"), "", "a" * 5000,
    "a\nb", "\x00", "\ud800", "../../etc", "/", "7", [], {}, [[]], {"a": {}}, [1, "2", None],
)  # fmt: skip
"""What takes the place of a value. A key may be gone, double or another one as well."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
SNIPPETS = (
    b"\xff\xfe", b"\xef\xbb\xbf", b"\x00" * 8, b"\n\n", b"\r", b'"', b"\\", b"\\ud800", b"{", b"[" * 2000, b"}" * 9,
    b"9" * 5000, b"NaN", b"-", b"1e999", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"text", b"null", b",", b":",
)  # fmt: skip

Way = Callable[[bytearray, random.Random], bytearray]


def mutate(content: bytes, generator: random.Random) -> bytes:
    """A broken copy. Structured text is broken by value in half of the cases, anything else by bytes."""
    if generator.random() < 0.5:
        broken = _by_value(content, generator)
        if broken is not None:
            return broken
    out = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        out = generator.choice(WAYS)(out, generator)
    return bytes(out)


def _at(content: bytearray, generator: random.Random) -> int:
    """A place, half of the time near one of the ends, where headers are."""
    if not content:
        return 0
    place = generator.choice((generator.randrange(len(content)), generator.randrange(min(64, len(content)))))
    return place if generator.random() < 0.75 else len(content) - 1 - place


def _flip(content: bytearray, generator: random.Random) -> bytearray:
    if content:
        content[_at(content, generator)] ^= 1 << generator.randrange(8)
    return content


def _cut(content: bytearray, generator: random.Random) -> bytearray:
    return content[: _at(content, generator)]


def _drop(content: bytearray, generator: random.Random) -> bytearray:
    start = _at(content, generator)
    del content[start : start + generator.choice((1, 2, 8, 100))]
    return content


def _insert(content: bytearray, generator: random.Random) -> bytearray:
    start = _at(content, generator)
    content[start:start] = generator.choice(SNIPPETS)
    return content


def _number(content: bytearray, generator: random.Random) -> bytearray:
    start, width = _at(content, generator), generator.choice((1, 2, 4, 8))
    value = generator.choice(NUMBERS) & (1 << 8 * width) - 1
    content[start : start + width] = struct.pack("<Q", value)[:width]
    return content


def _double(content: bytearray, generator: random.Random) -> bytearray:
    start = _at(content, generator)
    piece = content[start : start + generator.choice((1, 16, 1000))]
    content[start:start] = piece
    return content


def _zero(content: bytearray, generator: random.Random) -> bytearray:
    start = _at(content, generator)
    end = min(len(content), start + generator.choice((4, 64, 4096)))
    content[start:end] = bytes(end - start)
    return content


WAYS: tuple[Way, ...] = (_flip, _flip, _cut, _drop, _insert, _number, _double, _zero)


def _by_value(content: bytes, generator: random.Random) -> bytes | None:
    """One value of a JSON file, of a line of JSON lines, or of a TOML file replaced. None: it is none of them."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    lines = text.splitlines(keepends=True)
    number = generator.randrange(len(lines)) if lines else 0
    for start, end in ((0, len(lines)), (number, number + 1)):
        try:
            value = json.loads("".join(lines[start:end]))
        except ValueError:
            continue
        broken = json.dumps(_replaced(value, generator)).encode() + b"\n"
        return "".join(lines[:start]).encode() + broken + "".join(lines[end:]).encode()
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    broken_settings = _replaced(settings, generator)
    return _toml(broken_settings).encode("utf-8", "surrogatepass") if isinstance(broken_settings, dict) else None


def _replaced(value: Any, generator: random.Random) -> Any:
    """A copy with one value, key or entry changed, anywhere in it."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(list(value))
        copy = dict(value)
        how = generator.random()
        if how < 0.1:
            del copy[key]
        elif how < 0.2:
            copy[str(generator.choice(VALUES))] = copy.pop(key)
        else:
            copy[key] = _replaced(value[key], generator)
        return copy
    if isinstance(value, list) and value and generator.random() < 0.85:
        place = generator.randrange(len(value))
        how = generator.random()
        changed = [] if how < 0.1 else [value[place]] * 2 if how < 0.2 else [_replaced(value[place], generator)]
        return [*value[:place], *changed, *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and generator.random() < 0.5:
        return generator.choice((value + 1, value - 1, -value, value * 10, value << 32))
    return generator.choice(VALUES)


def _toml(settings: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML of its own making, so that values which the project's writer would refuse are written too."""
    lines = [f"[{'.'.join(map(json.dumps, path))}]"] if path else []
    lines += [f"{json.dumps(k)} = {_toml_value(v)}" for k, v in settings.items() if not isinstance(v, dict)]
    lines += [_toml(v, (*path, k)) for k, v in settings.items() if isinstance(v, dict)]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {_toml_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return "nan" if value != value else str(value)
    return json.dumps(value, ensure_ascii=False)
