"""Where two tokenizers differ, in words and by a text that they split differently."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.data.tokenizer import (
    canonical,
    load_tokenizer,
    read_tokenizer,
    tokenizer_file,
    unmerged,
)
from remit_megatron.errors import UserError

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
TEXTS = (
    "In 2023 there were 1,234,567 of them; it's 3.5% more, isn't it? We'll SEE, they'Ve",
    "def f(x):\n    if x:\n\t\treturn [x ** 2]  # ok\r\n\n\n    y = '''z'''",
    "  a leading blank",
    " a blank",
    "one line",
    "a   b",
    "\n\nnew\n \n",
    "   ",
    "\t\tx\ty",
    "na\u00efve caf\u00e9 cafe\u0301 \u00fcber stra\u00dfe \ufb01 \u212b",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u65e5\u672c\u8a9e\u306e\u6f22\u5b57\u3001\uff01 \uc548\ub155 \u4e00a\u4e8c",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea",
    "\u0661\u0662\u0663 \u00bd \u2167 12345678",
    "a\u00a0b\u2003c\u3000d\u200be",
    "\ue000\U0010ffff\u0378",
    "x\u0000y\u0001z",
    "<s> </s> <unk> <0x0A> <|endoftext|>",
)
"""What tokenizers tend to treat each in its own way."""
CANDIDATES = 200
"""Of the entries in which two vocabularies differ, as many are tried."""
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """Why two tokenizers give different ids."""

    reasons: list[str]
    """What differs, one phrase each."""
    example: str | None
    """A text and its two splits, in words; None where none of the texts tried shows the difference."""
    only_added_tokens: bool
    """Whether ids differ only where a text spells an added token that one side lacks."""


def has_tokenizer(folder: Path) -> bool:
    return tokenizer_file(folder).is_file()


def read_canonical(folder: Path) -> dict[str, Any]:
    """What decides ids in a folder's tokenizer.json. Raises UserError where it is none."""
    content = read_tokenizer(folder)
    try:
        return canonical(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{tokenizer_file(folder)}: no tokenizer of the `tokenizers` library: {error!r}") from None


def compare(one: Path, other: Path) -> Difference | None:
    """What makes the tokenizers of two folders give different ids; None where nothing does. Raises UserError."""
    a, b = read_canonical(one), read_canonical(other)
    if a == b:
        return None
    reasons = [_name(key, a.get(key), b.get(key)) for key in {**a, **b} if key != "added tokens" and _differ(a, b, key)]
    plain = not reasons
    moved, lonely = _added_differences(a["added tokens"], b["added tokens"])
    reasons += [f"{json.dumps(text)} is {shown}" for text, shown in moved.items()]
    if lonely:
        reasons.append(f"{len(lonely)} added tokens are in one only, such as {json.dumps(lonely[0])}")
    return Difference(reasons, _example(one, other, a, b), plain and not moved)


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool:
    return (key in a) != (key in b) or a.get(key) != b.get(key)


def _name(key: str, a: Any, b: Any) -> str:
    if key.startswith("model."):
        return f"{key} is {json.dumps(a)} in one and {json.dumps(b)} in the other"
    return f"another {key}"


def _added_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    moved = {}
    for text in [text for text in a if text in b and a[text] != b[text]]:
        (one, flags), (other, changed) = a[text], b[text]
        names = [flag for flag in flags if flags[flag] != changed[flag]]
        moved[text] = (
            f"{one} in one and {other} in the other"
            if one != other
            else f"found with {', '.join(f'{f} = {json.dumps(flags[f])}' for f in names)} in one and not in the other"
        )
    return moved, sorted(a.keys() ^ b.keys())


def _example(one: Path, other: Path, a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    tokenizers = [load_tokenizer(path) for path in (one, other)]
    shortest: tuple[str, list[Any]] | None = None
    for text in [*TEXTS, *_texts_of_added_tokens(a, b), *_texts_of_entries(tokenizers, a, b)]:
        encodings = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in tokenizers]
        if encodings[0].ids != encodings[1].ids and (shortest is None or len(text) < len(shortest[0])):
            shortest = (text, encodings)
    if shortest is None:
        return None
    first, second = (_split(encoding) for encoding in shortest[1])
    return f"{json.dumps(shortest[0])} becomes {first} in one and {second} in the other"


def _split(encoding: Any) -> str:
    pairs = [f"{json.dumps(token)} {number}" for token, number in zip(encoding.tokens, encoding.ids, strict=True)]
    return f"[{', '.join(pairs[:SHOWN])}{', ...' if len(pairs) > SHOWN else ''}]"


def _texts_of_added_tokens(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    ours, theirs = a["added tokens"], b["added tokens"]
    differing = [text for text in {**ours, **theirs} if ours.get(text) != theirs.get(text)]
    for token in differing[:CANDIDATES]:
        yield from (token, f"a{token}b", f"a {token} b", f"a{token}\n\n b", f" {token}")


def _texts_of_entries(tokenizers: list[Any], a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the entries and merges that only one side has, and of those that no merge leads to."""
    for tokenizer, mine, theirs in zip(tokenizers, (a, b), (b, a), strict=True):
        vocabulary = mine["vocabulary"]
        if not isinstance(vocabulary, dict):
            continue
        known = theirs["vocabulary"] if isinstance(theirs["vocabulary"], dict) else {}
        ids = [number for entry, number in vocabulary.items() if known.get(entry) != number][:CANDIDATES]
        merges = {tuple(pair) for pair in theirs["merges"]}
        pairs = [pair for pair in mine["merges"] if tuple(pair) not in merges][:CANDIDATES]
        ids += [vocabulary["".join(pair)] for pair in pairs if "".join(pair) in vocabulary]
        if mine.get("model.ignore_merges") != theirs.get("model.ignore_merges"):
            settings = {key.removeprefix("model."): value for key, value in mine.items() if key.startswith("model.")}
            ids += [vocabulary[entry] for entry in unmerged(settings, vocabulary, mine["merges"])[:CANDIDATES]]
        for number in ids:
            yield tokenizer.decode([number], skip_special_tokens=False)
