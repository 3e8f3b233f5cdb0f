"""Tokenizers: how one is loaded, and the identity of what decides its ids.

A tokenizer.json holds much that no id depends on: offsets, the decoder, the template of a chat, padding of a last call.
`canonical` keeps the rest, with the defaults of the `tokenizers` library filled in, so that a file that another program
loaded and saved again is the same tokenizer, and one that gives other ids is another.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.errors import UserError
from remit_megatron.outside import quote, read_bytes, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULTS: dict[str, dict[str, Any]] = {
    "BPE": {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
    "Unigram": {"unk_id": None, "byte_fallback": False},
    "WordPiece": {"max_input_chars_per_word": 100},
    "ByteLevel": {"use_regex": True},
    "Metaspace": {"prepend_scheme": "always", "split": True},
    "Punctuation": {"behavior": "Isolated"},
    "FixedLength": {"length": 5},
}
"""What the library takes for an absent key."""
IDLE = {"ByteLevel": ("trim_offsets",), "Metaspace": ("add_prefix_space", "str_rep")}
"""Keys that no id depends on: offsets, and what an older spelling repeats."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
BYTE_CHARACTERS = frozenset(
    [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))] + [chr(256 + i) for i in range(68)]
)
"""The characters that a byte-level tokenizer writes the 256 bytes as."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
"""What decides where an added token is found. `special` only matters where ids become text."""


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a user has named by itself or by its folder."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def load_tokenizer(path: str | Path, key: str = "tokenizer") -> "Tokenizer":
    """The tokenizer of a tokenizer.json, or of the folder that holds it, without the truncation and padding it keeps.

    Encode with `add_special_tokens=False`: no dataset has the tokens of a template. Raises UserError, naming `key`.
    """
    file = tokenizer_file(path)
    if not file.is_file():
        raise UserError(f"{key}: {file} does not exist: name a tokenizer.json, or a folder with one")
    try:
        return parse_tokenizer(read_bytes(file).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {file} cannot be read: {error}") from None


def parse_tokenizer(text: str) -> "Tokenizer":
    """The tokenizer that the text of a tokenizer.json describes. Raises ValueError with the library's reason."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:
        # The library raises bare Exceptions, and its panics derive from BaseException only.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(_first_line(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(path: str | Path) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises UserError where it is none."""
    file = tokenizer_file(path)
    try:
        content = read_object(file)
    except UserError as error:
        raise UserError(f"{error}; no readable tokenizer.json") from None
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: no tokenizer of the `tokenizers` library: it has no key 'model'")
    return content


def tokenizer_hash(path: str | Path) -> str:
    """The identity of the tokenizer in a file or folder; see `identity`. Raises UserError where it cannot be read."""
    file = tokenizer_file(path).absolute()
    try:
        found = file.stat()
    except (OSError, ValueError):
        return _file_identity(file, 0, 0)  # which says what is wrong
    return _file_identity(file, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=16)
def _file_identity(file: Path, modified_ns: int, size: int) -> str:
    """Seconds for a large vocabulary, and a start asks several times; the arguments name one content of the file."""
    content = read_tokenizer(file)
    try:
        return identity(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: no tokenizer of the `tokenizers` library: {_first_line(error)}") from None


def identity(content: Mapping[str, Any]) -> str:
    """Four hashes with dashes between, of a tokenizer.json's content, for `same_tokenizer` to compare.

    What splits text (32 hex digits), the added tokens (16), and two by which what was made before knows its tokenizer:
    the beginning of the SHA-256 over the whole file (16), of datasets, and a shorter one (12), of converted models.
    """
    parts = canonical(content)
    added = parts.pop("added tokens")
    return f"{_digest(parts)[:32]}-{_digest(added)[:16]}-{_former_hash(content)[:16]}-{_former_fingerprint(content)}"


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two identities stand for tokenizers that give the same ids; either may be one of before.

    Two of before that are of different kinds cannot be compared, and pass.
    """
    new = [known for known in (one, other) if "-" in known]
    if len(new) == 2:
        return one.split("-")[:2] == other.split("-")[:2]
    if not new:
        return one == other or len(one) != len(other)
    old = one if new[0] is other else other
    _, _, whole, short = new[0].split("-")
    return old == short if len(old) == len(short) else old.startswith(whole)


def deciding(known: str) -> str:
    """The part of an identity that is equal for all files of one tokenizer, for a place that compares text alone."""
    return "-".join(known.split("-")[:2])


def fullest(known: Sequence[str | None]) -> str | None:
    """Of identities of one tokenizer, one that any other can be compared with: none of before where there is another.

    None where there is none.
    """
    return max(filter(None, known), key=lambda one: "-" in one, default=None)


def differ_in_added_tokens_only(one: str, other: str) -> bool:
    """Whether two identities agree but for added tokens: ids then differ where a text spells one of those."""
    a, b = one.split("-"), other.split("-")
    return len(a) == len(b) > 1 and a[0] == b[0] and a[1] != b[1]


def canonical(content: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the ids of a text, by name, and nothing else: equal for two files if they give equal ids.

    What only a text decides that the pre-tokenizer never makes, an entry that it cuts in two for instance, counts.
    `normalizer` and `pre-tokenizer` are lists of steps, `added tokens` a dict from text to [id, flags], `vocabulary`
    and `merges` those of the model, and the rest are its settings. Raises KeyError, TypeError or ValueError for a
    content that the library would not load.
    """
    normalizer = _steps(content.get("normalizer"), "normalizers")
    absent = _replaced(normalizer)
    # A split at what the normalizer leaves none of never happens.
    pre_tokenizer = [
        step
        for step in _steps(content.get("pre_tokenizer"), "pretokenizers")
        if not (step["type"] == "Split" and step["pattern"].get("String") in absent and not step["invert"])
    ]
    stored_tokens = content.get("added_tokens") or []
    # A text that is such a token never reaches the model.
    taken = {token["content"] for token in stored_tokens if not token.get("single_word")}
    model = _model(content["model"], bool(pre_tokenizer) and pre_tokenizer[-1]["type"] == "ByteLevel", taken)
    return {
        **model,
        "normalizer": normalizer,
        "pre-tokenizer": pre_tokenizer,
        "added tokens": _added_tokens(stored_tokens, model["vocabulary"], bool(normalizer)),
    }


def largest_id(parts: Mapping[str, Any]) -> int:
    """Of a canonical content; -1 where it has no tokens."""
    vocabulary = parts["vocabulary"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*ids, *(number for number, _ in parts["added tokens"].values())], default=-1)


def _model(stored: Mapping[str, Any], byte_level: bool, taken: Set[str]) -> dict[str, Any]:
    kind = stored.get("type") or _unnamed_type(stored)
    model = {**DEFAULTS.get(kind, {}), **stored, "type": kind}
    vocabulary = model.pop("vocab")
    merges = [list(pair.split(" ")) if isinstance(pair, str) else pair for pair in model.pop("merges", None) or []]
    if kind == "BPE":
        _settle_bpe(model, vocabulary, merges, byte_level)
        if model["ignore_merges"]:
            model["ignore_merges"] = not taken >= set(unmerged(model, vocabulary, merges))
    settings = {f"model.{key}": value for key, value in model.items()}
    return {"vocabulary": vocabulary, "merges": merges, **settings}


def _unnamed_type(stored: Mapping[str, Any]) -> str:
    """Files of early versions do not say which model they hold."""
    if "merges" in stored:
        return "BPE"
    if isinstance(stored.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in stored else "WordLevel"


def _settle_bpe(model: dict[str, Any], vocabulary: Mapping[str, int], merges: list[Any], byte_level: bool) -> None:
    """Give settings that change nothing with this vocabulary the value that says so."""
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        model[key] = model[key] or None
    affixes = model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    whole_alphabet = byte_level and not affixes and vocabulary.keys() >= BYTE_CHARACTERS
    if whole_alphabet or not vocabulary.keys() & BYTES:
        model["byte_fallback"] = False
    if whole_alphabet or (model["byte_fallback"] and vocabulary.keys() >= BYTES):
        model["unk_token"] = None  # no character is unknown
    if model["unk_token"] is None:
        model["fuse_unk"] = False


def unmerged(model: Mapping[str, Any], vocabulary: Mapping[str, int], merges: list[Any]) -> list[str]:
    """Entries of a BPE vocabulary that its merges do not lead to: `ignore_merges` gives them all the same."""
    from tokenizers import models

    named = ("continuing_subword_prefix", "end_of_word_suffix")
    affixes = {key: model[key] for key in named if model.get(key)}  # the library takes no None
    try:
        merging = models.BPE(vocab=dict(vocabulary), merges=[tuple(pair) for pair in merges], **affixes)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(_first_line(error)) from None
    return [entry for entry in vocabulary if [token.value for token in merging.tokenize(entry)] != [entry]]


def _steps(stored: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps: null and an empty sequence are the same."""
    if stored is None:
        return []
    if stored["type"] == "Sequence":
        return [step for part in stored[inner] for step in _steps(part, inner)]
    kind = stored["type"]
    step = {**DEFAULTS.get(kind, {}), **stored}
    if kind == "Metaspace" and stored.get("add_prefix_space") is False:
        step["prepend_scheme"] = "never"
    return [{key: value for key, value in step.items() if key not in IDLE.get(kind, ())}]


def _replaced(normalizer: list[dict[str, Any]]) -> set[str]:
    """Characters of which a normalized text has none: each is replaced, and no later step brings it back."""
    absent: set[str] = set()
    for step in normalizer:
        if step["type"] not in ("Replace", "Prepend"):
            return set()
        brought = step["content"] if step["type"] == "Replace" else step["prepend"]
        character = step["pattern"].get("String") if step["type"] == "Replace" else None
        if character and len(character) == 1:
            absent.add(character)
        absent -= set(brought)
    return absent


def _added_tokens(stored: list[Any], vocabulary: Any, normalizes: bool) -> dict[str, list[Any]]:
    """Text -> [id, flags], with the ids that the library gives: the vocabulary's, else the next free ones."""
    known = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added: dict[str, list[Any]] = {}
    largest = -1
    for token in stored:
        text = token["content"]
        if not text:
            continue
        number = known.get(text, added[text][0] if text in added else None)
        if number is None:
            number = max(largest + 1, len(known))
        largest = max(largest, number)
        added[text] = [number, {flag: token.get(flag, False) for flag in FLAGS}]
    # Without a normalizer the two kinds of token are found in the same text; mixed, one kind is looked for first.
    if not normalizes and len({flags["normalized"] for _, flags in added.values()}) == 1:
        for _, flags in added.values():
            flags["normalized"] = False
    return added


def _former_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but padding and truncation."""
    kept = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    merges = kept["model"].get("merges")
    if merges and isinstance(merges[0], str):  # written "a b" by older versions and ["a", "b"] by newer ones
        kept["model"] = {**kept["model"], "merges": [merge.split(" ") for merge in merges]}
    return _digest(kept)


def _former_fingerprint(content: Mapping[str, Any]) -> str:
    """Of some parts as they are written."""
    model = content["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or []]
    splitting = {"normalizer": content.get("normalizer"), "pre-tokenizer": content.get("pre_tokenizer")}
    return _digest({"model type": model.get("type"), "vocabulary": model["vocab"], "merges": merges, **splitting})[:12]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return quote(" ".join(str(error).split())) or type(error).__name__
