"""The data formats of the field, read row by row into one form each, with the row named where one does not fit.

sft: `messages`. dpo: `prompt`, `chosen`, `rejected`, as text or messages; or `chosen` and `rejected` as whole
conversations with one beginning. rl: `prompt` or `messages`, `ground_truth`, and the verifier's name in `verifier` or,
as open-instruct has it, in `dataset`.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from remit_megatron.errors import UserError

Messages: TypeAlias = list[dict[str, str]]
Row: TypeAlias = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
VERIFIER_COLUMNS = ("verifier", "dataset")


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with an answer that can be verified."""

    where: str
    prompt: Messages | str
    ground_truth: Any
    verifier: str


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of a .parquet file, or of JSON lines, also .gz, .zst or .zstd; rows count from 1.

    Raises UserError naming the file and the row.
    """
    if path.lower().endswith(".parquet"):
        yield from _read_parquet(path)
        return
    number = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield f"{path}, row {number}", _object(text, f"{path}, row {number}")
    except (OSError, EOFError, ValueError, zlib.error) as error:  # of an archive, in the line after the last one
        raise _unreadable(f"{path}, row {number + 1}", error) from None
    if number == 0:
        raise UserError(f"{path}: holds no rows")


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise _unreadable(where, error) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object")
    return row


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: cannot be read: {' '.join(str(error).split())[:200]}")


def _lines(path: str) -> Iterator[bytes]:
    """Of all members and frames of an archive. Raises OSError, EOFError, ValueError or zlib.error for one that is
    damaged or cut."""
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as packed:
            yield from packed
    elif path.lower().endswith((".zst", ".zstd")):
        rest = b""
        for part in _frames(path):
            *lines, rest = (rest + part).split(b"\n")
            yield from lines
        if rest:
            yield rest
    else:
        with open(path, "rb") as plain:
            yield from plain


def _frames(path: str) -> Iterator[bytes]:
    """The library's own stream reader ends in silence inside a frame that is cut."""
    import zstandard

    decompressor, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    with open(path, "rb") as file:
        try:
            while data := file.read(1 << 20):
                while data:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _read_parquet(path: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None
    if number == 0:
        raise UserError(f"{path}: holds no rows")


def conversation(where: str, row: Row) -> Messages:
    """Of `messages`; the last one is the assistant's."""
    messages = _messages(where, "messages", _column(where, row, "messages"))
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: messages does not end with an answer of the assistant")
    return messages


def preference(where: str, row: Row) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected`: all of them messages, or all of them text."""
    chosen, rejected = (_column(where, row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _column(where, row, "prompt")
        if not isinstance(prompt, str):
            return {
                "prompt": _messages(where, "prompt", prompt),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    chosen, rejected = _messages(where, "chosen", chosen), _messages(where, "rejected", rejected)
    if isinstance(row.get("prompt"), list):
        prompt = _messages(where, "prompt", row["prompt"])
        size = len(prompt)
        if chosen[:size] == prompt and rejected[:size] == prompt:
            chosen, rejected = chosen[size:], rejected[size:]
    else:
        size = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)) - 1,
        )
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise UserError(f"{where}: {name} is not one answer of the assistant after the prompt that both share")
    if not prompt:
        raise UserError(f"{where}: chosen and rejected begin with different messages, and there is no prompt")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def problem(where: str, row: Row, verifier: str | None) -> Problem:
    """verifier: for a row that names none."""
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = _messages(where, "prompt", prompt)
    else:
        prompt = _messages(where, "messages", _column(where, row, "messages", "prompt"))
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with an answer of the assistant: leave it out")
    truth = _column(where, row, "ground_truth")
    named = next((row[name] for name in VERIFIER_COLUMNS if row.get(name)), verifier)
    if isinstance(named, list):  # open-instruct allows several, and its published data have one
        named, truth = _only(where, named), truth[0] if isinstance(truth, list) and len(truth) == 1 else truth
    if not isinstance(named, str):
        raise UserError(f"{where}: names no verifier: add a column `verifier`, or set rl.verifier")
    return Problem(where, prompt, truth, named)


def _only(where: str, names: list[Any]) -> Any:
    if len(names) != 1:
        raise UserError(f"{where}: names {len(names)} verifiers, and one is expected")
    return names[0]


def _column(where: str, row: Row, name: str, other: str | None = None) -> Any:
    value = row.get(name)
    if value is None or value == "" or value == []:
        state = "is empty" if name in row else f"is missing (it has {', '.join(sorted(row)) or 'no columns'})"
        raise UserError(f"{where}: column `{name}`{f' or `{other}`' if other else ''} {state}")
    return value


def _messages(where: str, name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: {name} is no list of messages ({{role, content}})")
    found = []
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise UserError(
                f"{where}: message {number} of {name} has role {role!r} and content {str(content)[:40]!r}: a role of "
                f"{', '.join(ROLES)} and a text are expected"
            )
        found.append({"role": role, "content": content})
    return found
