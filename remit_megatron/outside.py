"""Text from outside: one way to read a file that a user or another program wrote, and to quote what is wrong with it.

Whatever it holds, what is raised is a UserError that names the file and fits on a line.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from remit_megatron.errors import UserError

MAX_BYTES = 256 << 20
"""Of a file that is read whole. The largest known tokenizer.json has 35 MB."""
MAX_DEPTH = 64
"""Of nesting. Python's own limit of some 1,000 levels is reached by what works on the content, not by the reader."""
NAME_BYTES = 255
"""Of one name in a path, as file systems have it."""
QUOTED = 200
"""Characters of a value that a message shows at most."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

T = TypeVar("T", bound=BaseModel)


def quote(value: Any, limit: int = QUOTED) -> str:
    """A value on one line of at most `limit` characters: control characters and half characters are escaped."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_bytes(path: Path, what: str = "file", *, limit: int = MAX_BYTES) -> bytes:
    """A whole file. Raises UserError where there is none, it cannot be read, is no file or has more than `limit`."""
    where = f"{what} {quote(str(path))}" if what else quote(str(path))
    try:
        # A pipe or a device would be waited for, or never end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{where}: cannot be read: {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise UserError(f"{where}: cannot be read: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{where}: cannot be read: {reason}") from None
    if len(content) > limit:
        raise UserError(f"{where}: more than {limit:,} bytes, which is no {what or 'such file'}")
    return content


def parse_json(content: bytes | str, where: str) -> Any:
    """A JSON value. Raises UserError naming `where` for what is none, is nested too deep or holds half a character.

    NaN and Infinity are read, as Python and PyTorch write them; who needs a finite number checks it.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON: {quote(str(error))}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and is_too_deep(value):
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    return value


def parse_object(content: bytes | str, where: str) -> dict[str, Any]:
    """As `parse_json`, and it must be an object."""
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: is no JSON object but {quote(json.dumps(value), 40)}")
    return value


def read_json(path: Path, what: str = "", *, limit: int = MAX_BYTES) -> Any:
    """The JSON value in a file. Raises UserError as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, what, limit=limit), quote(str(path)))


def read_object(path: Path, what: str = "", *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError as `read_bytes` and `parse_object`."""
    return parse_object(read_bytes(path, what, limit=limit), quote(str(path)))


def read_model(path: Path, model: type[T], remedy: str, *, limit: int = MAX_BYTES) -> T:
    """The pydantic model in a JSON file. Raises UserError naming file, key, what is wrong there, and the remedy."""
    try:
        return model.model_validate(read_object(path, limit=limit))
    except ValidationError as error:
        raise UserError(f"{quote(str(path))}: {problem(error)}; {remedy}") from None
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def problem(error: ValidationError) -> str:
    """The first thing that a model refuses: key, what is wrong, and the value where it is short enough to show."""
    first = error.errors(include_url=False)[0]
    key = quote(".".join(map(str, first["loc"])), 100)
    message = quote(first["msg"].removeprefix("Value error, "))
    value = first.get("input")
    got = f" (got {quote(value if isinstance(value, str) else repr(value))})" if not isinstance(value, dict) else ""
    return f"{key}: {message}{got}" if key else f"{message}{got}"


def impossible_name(value: Any, key: str = "") -> tuple[str, str] | None:
    """(key, text) of the first text in settings that can be no path: it has a NUL, or a name longer than files have."""
    if isinstance(value, dict):
        children = [(f"{key}.{name}" if key else str(name), child) for name, child in value.items()]
    elif isinstance(value, list | tuple):
        children = [(f"{key}.{number}", child) for number, child in enumerate(value)]
    else:
        names = value.split(os.sep) if isinstance(value, str) else ()
        wrong = any(len(os.fsencode(name)) > NAME_BYTES or "\0" in name for name in names)
        return (key, value) if wrong else None
    return next((found for name, child in children if (found := impossible_name(child, name))), None)


def is_too_deep(value: Any) -> bool:
    """Whether lists and dictionaries are nested more than MAX_DEPTH levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, list | dict)
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, list | dict)
        ]
    return bool(level)
