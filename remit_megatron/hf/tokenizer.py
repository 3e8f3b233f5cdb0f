"""What makes two tokenizers give the same ids: vocabulary, merges, normalisation, splitting; not a chat template."""

import hashlib
import json
from pathlib import Path
from typing import Any

from remit_megatron.hf.config import read_json

CONTENT = ("normalizer", "pre_tokenizer")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What an export copies byte for byte, where it is there."""


def content(folder: Path) -> dict[str, Any] | None:
    """The parts of tokenizer.json that decide ids, each by itself; None where there is no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or []]
    return {
        "model type": model.get("type"),
        "vocabulary": model.get("vocab"),
        "merges": merges,
        **{part.replace("_", "-"): tokenizer.get(part) for part in CONTENT},
        "added tokens": {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []},
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what makes ids differ, what does not): one line each.

    An added token that only one side has, or an id that only one side names, changes nothing for text without it.
    """
    wrong = [f"tokenizer: another {part}" for part in one if part != "added tokens" and one[part] != other[part]]
    a, b = one["added tokens"], other["added tokens"]
    moved = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
    wrong += [f"tokenizer: {json.dumps(token)} is {a[token]} in one and {b[token]} in the other" for token in moved]
    only = sorted(a.keys() ^ b.keys())
    fine = [f"tokenizer: {len(only)} added tokens are in one only, such as {json.dumps(only[0])}"] if only else []
    return wrong, fine


def largest_id(parts: dict[str, Any]) -> int:
    vocabulary = parts["vocabulary"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or [])))
    return max([*ids, *parts["added tokens"].values()], default=-1)


def fingerprint(parts: dict[str, Any]) -> str:
    """Twelve hex digits of the parts that decide ids, added tokens left out."""
    kept = {key: value for key, value in parts.items() if key != "added tokens"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
