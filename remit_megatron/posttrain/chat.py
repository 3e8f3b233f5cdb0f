"""The model that an engine is given: the parent's weights, with tokenizer files that say how a turn ends.

Engines rewrite tokenizer files and mark configs as their own. So these are made once, before the engine runs, and put
over whatever it leaves.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from remit_megatron.data.files import writing
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.hf import tokenizer
from remit_megatron.hf.config import read_json
from remit_megatron.hf.folder import INDEX, HFFolder
from remit_megatron.posttrain.contract import StageSpec

TEMPLATE = "chat_template.jinja"
CONFIGS = ("config.json", "generation_config.json")


def make_input(spec: StageSpec, target: Path) -> Path:
    """A Hugging Face folder at `target`: links to the parent's weights, and its other files as the stage wants them.

    Raises UserError for a folder without a tokenizer or end of turn, or a template that cannot be read.
    """
    parent = Path(spec.model)
    if not (parent / "config.json").is_file():
        raise UserError(f"model: {parent} is no Hugging Face folder: it has no config.json")
    weights = HFFolder(parent)
    if not (parent / "tokenizer.json").is_file():
        raise UserError(f"model: {parent} has no tokenizer.json: post-training needs the model's tokenizer")
    with writing(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in weights.shards + ([INDEX] if (parent / INDEX).exists() else []):
            (target / name).symlink_to((parent / name).resolve())
        for name in (*CONFIGS, *tokenizer.FILES):
            if (parent / name).is_file():
                shutil.copyfile(parent / name, target / name)
        if spec.chat.template is not None:
            _put_template(target, spec.chat.template)
        end = spec.chat.end_of_turn or _known_end(target)
        _put_end(target, end)
    return target


def put_files(given: Path, folder: Path) -> None:
    """Put the input's configs and tokenizer files over an engine's own."""
    for name in (*CONFIGS, *tokenizer.FILES):
        (folder / name).unlink(missing_ok=True)
        if (given / name).is_file():
            shutil.copyfile(given / name, folder / name)


def token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _put_template(target: Path, template: str) -> None:
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat.template: {template}: cannot be read: {error}") from None
    (target / "chat_template.json").unlink(missing_ok=True)
    (target / TEMPLATE).write_text(text, encoding="utf-8")
    _edit(target / "tokenizer_config.json", chat_template=None)


def _known_end(target: Path) -> str:
    path = target / "tokenizer_config.json"
    end = token_text(read_json(path).get("eos_token")) if path.is_file() else None
    if not end:
        raise UserError(
            f"model: {path.name} names no eos_token: give the token that ends an answer as chat.end_of_turn"
        )
    return end


def _put_end(target: Path, end: str) -> None:
    """Make a token the one that ends an answer, in every file that names one."""
    number = load_tokenizer(target, "model").token_to_id(end)
    if number is None:
        known = sorted(tokenizer.read_canonical(target)["added tokens"])[:8]
        raise UserError(
            f"chat.end_of_turn: the tokenizer has no token {json.dumps(end)}, and the vocabulary is not extended; it "
            f"has {', '.join(map(json.dumps, known)) or 'no special tokens'}"
        )
    rows = read_json(target / "config.json").get("vocab_size")
    if isinstance(rows, int) and number >= rows:
        raise UserError(f"chat.end_of_turn: {json.dumps(end)} is id {number}, and the model has {rows} rows")
    _edit(target / "tokenizer_config.json", eos_token=end)
    if (target / "special_tokens_map.json").is_file():
        _edit(target / "special_tokens_map.json", eos_token=end)
    for name in CONFIGS:
        if (target / name).is_file():
            _edit(target / name, eos_token_id=number)


def _edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**(read_json(path) if path.is_file() else {}), **changes}
    content = {key: value for key, value in content.items() if not (key in changes and value is None)}
    path.write_text(json.dumps(content, indent=2) + "\n")


def has_template(folder: Path) -> bool:
    """Whether the tokenizer files name a chat template."""
    path = folder / "tokenizer_config.json"
    named = path.is_file() and bool(read_json(path).get("chat_template"))
    return named or any((folder / name).is_file() for name in (TEMPLATE, "chat_template.json"))
