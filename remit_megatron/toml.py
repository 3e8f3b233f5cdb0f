"""Settings as TOML: overrides from the command line, what a model refuses in words, and the way back to text."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from remit_megatron.errors import UserError


def read(path: Path, what: str) -> dict[str, Any]:
    """A file's settings. Raises UserError naming it; what: such as "recipe"."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {path}: no valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: cannot be read: {error}") from None


def override(settings: dict[str, Any], assignment: str) -> None:
    """Set one key as `key.sub=value`, the value in TOML syntax or a bare string. Raises UserError for other text."""
    key, equals, text = assignment.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {assignment}: write it as key=value, for example optimizer.peak_lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        value = text.strip()
        if value.startswith(("'", '"', "[", "{")):
            raise UserError(f"--set {assignment}: no valid TOML value: {error}") from None
    for name in names[:-1]:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise UserError(f"--set {assignment}: {name} is not a section")
    settings[names[-1]] = value


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong first in settings that `model` does not take, in one line that names the key.

    An unknown key goes first: misspelt, it is also why another one is missing.
    """
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1) or difflib.get_close_matches(where[-1], known, 1, 0.4)
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"missing key {key}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    got = f" (got {value!r})" if isinstance(value, str | int | float | bool) else ""
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
