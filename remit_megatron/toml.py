"""Settings as TOML: overrides from the command line, what a model refuses in words, and the way back to text."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from remit_megatron.errors import UserError
from remit_megatron.outside import QUOTED, is_too_deep, quote, read_bytes

MAX_BYTES = 4 << 20
"""Of a TOML file."""


def read(path: Path, what: str) -> dict[str, Any]:
    """A file's settings. Raises UserError naming it; what: such as "recipe"."""
    try:
        return parse(read_bytes(path, what, limit=MAX_BYTES).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: no UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise UserError(f"{what} {path}: no valid TOML: {quote(str(error))}") from None


def parse(text: str) -> dict[str, Any]:
    """A TOML document. Raises ValueError saying what is wrong, for numbers or nesting past any sense too."""
    try:
        settings = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if is_too_deep(settings):
        raise ValueError("nested too deep")
    return settings


def override(settings: dict[str, Any], assignment: str) -> None:
    """Set one key as `key.sub=value`, the value in TOML syntax or a bare string. Raises UserError for other text."""
    key, equals, text = assignment.partition("=")
    names = key.strip().split(".")
    shown = quote(assignment)
    if not equals or not all(names):
        raise UserError(f"--set {shown}: write it as key=value, for example optimizer.peak_lr=3e-4")
    if not text.strip():
        raise UserError(f"--set {shown}: no value; an empty text is written {names[-1]}='\"\"', and no value is the "
                        "default: leave the key out")  # fmt: skip
    try:
        parsed = parse(f"value = {text}")
        if parsed.keys() != {"value"}:
            raise UserError(f"--set {shown}: sets {len(parsed)} keys: give each a --set of its own")
        value = parsed["value"]
    except ValueError as error:
        value = text.strip()
        if value.startswith(("'", '"', "[", "{")) or not value.isprintable():
            raise UserError(f"--set {shown}: no valid TOML value: {quote(str(error))}") from None
    for name in names[:-1]:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise UserError(f"--set {shown}: {name} is not a section")
    settings[names[-1]] = value


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong first in settings that `model` does not take, in one line that names the key.

    An unknown key goes first: misspelt, it is also why another one is missing.
    """
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = [str(part) for part in first["loc"]]
    key = quote(".".join(where), 100)
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1) or difflib.get_close_matches(where[-1], known, 1, 0.4)
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
    if first["type"] == "missing":
        return f"missing key {key}"
    message = quote(first["msg"].removeprefix("Value error, "), 2 * QUOTED)
    value = first.get("input")
    got = f" (got {quote(repr(value))})" if isinstance(value, str | int | float | bool) else ""
    return f"{key}: {message}{got}" if key else message


def _keys_at(section: type[BaseModel], where: list[str]) -> list[str]:
    for name in where:
        if name.isdigit() or name not in section.model_fields:  # a place in a list, a name that the user chose
            continue
        annotation = section.model_fields[name].annotation
        section = next(t for t in _flatten(annotation) if isinstance(t, type) and issubclass(t, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _flatten(annotation: Any) -> list[Any]:
    if get_origin(annotation) is None:
        return [annotation]
    return [leaf for part in get_args(annotation) for leaf in _flatten(part)]


def dumps(settings: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """A document that tomllib reads back to equal settings; None has no place in it. path: of the section itself."""
    lines = [f"\n[{'.'.join(map(_dump_key, path))}]"] if path else []
    lines += [f"{_dump_key(k)} = {dump_value(v)}" for k, v in settings.items() if not isinstance(v, dict)]
    children = [dumps(v, (*path, k)) for k, v in settings.items() if isinstance(v, dict)]
    return "\n".join(lines + [child.rstrip("\n") for child in children]) + "\n"


def dump_value(value: Any) -> str:
    """One value, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if "e" in repr(value) or "." in repr(value) else f"{value!r}.0"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dump_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_dump_key(k)} = {dump_value(v)}" for k, v in value.items()) + "}"
    return _dump_string(value) if isinstance(value, str) else repr(value)


def _dump_string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, and for JSON's surrogate pairs where TOML wants the character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _dump_key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _dump_string(key)
