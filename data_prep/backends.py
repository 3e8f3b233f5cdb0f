"""Two tokenizer libraries behind one call: gigatoken where it is exact, the Hugging Face `tokenizers` everywhere else.

`tokenizers` defines what is right. gigatoken is 30 times faster and reproduces it for most byte-level and
SentencePiece-style BPE; `choose_backend` uses it only after comparing both on the input itself, on the added tokens,
and on characters of every kind. Texts with a character on which they differ are left to `tokenizers`.
"""

import functools
import importlib.metadata
import json
import os
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from remit_megatron.data.tokenizer import parse_tokenizer, tokenizer_hash
from remit_megatron.errors import UserError
from remit_megatron.outside import quote, read_bytes, read_object

CACHE_BYTES = 128 << 20
"""gigatoken keeps every word that it has seen. When this much memory has gone into that, it begins anew."""
LOOK_BYTES = 1 << 20
"""After so much text it is looked how much that is."""
CHECK_CHARACTERS = 1 << 16
"""Of a document, as much as this is compared: `tokenizers` needs over 100 bytes of memory for each byte of text."""
HF_BATCH_BYTES = 1 << 20
LARGE_BYTES = 1 << 22
"""Texts from this size on are encoded one by one, which needs half the memory of a batch."""

MAX_EXACT = 2000
"""gigatoken is not used where it differs on more characters than these."""

HOSTILE_TEXTS = (
    "",
    " ",
    "\n",
    " " * 10_000,
    "\n" * 3000 + "a" * 3000 + "\t" * 3000,
    "a\r\nb\r\n\r\n c\r \r\n\r",
    "\ufeffx\ufeff y",
    "".join(map(chr, range(1, 0xA1))) + "\0a\0",
    "e\u0301a\u0300\u0301 \u0928\u093c\u092e\u0938\u094d\u0924\u0947 a" + "\u0301" * 40 + "\u0344\u0f73\u0958",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f1e9\U0001f1ea a\U0001f600b",
    "I'm he'LL they'Ve 'S don't \u2019s it'\u017f x'\u017f",
    "1234567 \u0661\u0662\u0663\u0664 \u00bd \u2167 12.5e-3 1,000,000",
    "\u6f22\u5b57\u304b\u306a\u3001\u30c6\u30b9\u30c8\uff01\ud55c\uad6d\uc5b4\u3131 \u4e00a\u4e8c",
    "a \u00a0\u2003\u3000 \t\t\n \v\f\x1c\x85 b\u200bc\u2028d\u2029",
    "\U00020000\U0001f9d1\ue000\U0010ffff\ufffd",
    "\u01c5ungla \u0130stanbul \u017ftra\u00dfe \ufb01 \u1e9b\u0323",
    "\t\tif x:\n\t\t\treturn (a+b)//2  # ok\n\n\n    y = '''z'''",
)


class Backend(Protocol):
    """Encodes texts without special tokens of the tokenizer's template (no BOS, no EOS)."""

    name: str
    version: str

    def encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one integer array [sum(lengths)], and their lengths [texts] int64."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A tokenizer.json and what we need to know of it."""

    path: Path
    hash: str
    content: str
    vocab_size: int
    """Largest id + 1, added tokens included."""
    added_tokens: dict[str, int] = field(hash=False)

    @staticmethod
    def load(path: str | Path) -> "TokenizerFile":
        """Read a tokenizer.json, or that of a folder. Raises UserError where it is none."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; --tokenizer takes a tokenizer.json or a folder with one "
                "(transformers writes one with save_pretrained for every fast tokenizer)"
            )
        digest = tokenizer_hash(file)
        content = read_bytes(file).decode("utf-8")
        tokenizer = _load_hf(content, file)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        added = {token["content"]: token["id"] for token in json.loads(content).get("added_tokens", [])}
        return TokenizerFile(file, digest, content, max(ids.values()) + 1, added)

    def eod_id(self, token: str | None) -> int:
        """The id of `token`, or of tokenizer_config.json's eos_token. Raises UserError where there is none."""
        origin = "--eod-token"
        if token is None:
            origin = f"{self.path.parent / 'tokenizer_config.json'}: eos_token"
            token = self._configured_eos()
        found = _load_hf(self.content, self.path).token_to_id(token) if token else None
        if found is None:
            known = ", ".join(sorted(self.added_tokens)[:12]) or "none"
            said = f"'{token}' is no token of {self.path}" if token else f"{origin} is missing"
            raise UserError(f"--append-eod: {said}; name the EOD token with --eod-token (added tokens: {known})")
        return int(found)

    def _configured_eos(self) -> str | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            config = self.path.parent / name
            eos = read_object(config).get("eos_token") if config.is_file() else None
            eos = eos.get("content") if isinstance(eos, dict) else eos
            if eos is not None and not isinstance(eos, str):
                raise UserError(f"{config}: eos_token is {quote(repr(eos))}, no text: name the token with --eod-token")
            if eos:
                return eos
        return None


class HuggingFace:
    """The `tokenizers` library: the reference."""

    name = "tokenizers"

    def __init__(self, file: TokenizerFile) -> None:
        self.version = importlib.metadata.version("tokenizers")
        self._tokenizer = _load_hf(file.content, file.path)

    def encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See Backend. Texts go in small groups, because an encoding takes far more memory than its ids."""
        ids, lengths = [np.zeros(0, np.uint32)], np.zeros(len(texts), np.int64)
        start = 0
        while start < len(texts):
            end, size = start, 0
            while end < len(texts) and (end == start or size + len(texts[end]) <= HF_BATCH_BYTES):
                size += len(texts[end])
                end += 1
            group = [text.decode() if isinstance(text, bytes) else text for text in texts[start:end]]
            for number, encoding in enumerate(
                self._tokenizer.encode_batch_fast(group, add_special_tokens=False), start
            ):
                ids.append(np.array(encoding.ids, dtype=np.uint32))
                lengths[number] = len(ids[-1])
            start = end
        return np.concatenate(ids), lengths


class Gigatoken:
    """gigatoken on the calling thread."""

    name = "gigatoken"

    def __init__(self, file: TokenizerFile) -> None:
        """Raises UserError where the library is missing or cannot load this tokenizer."""
        try:
            import gigatoken
        except ImportError:
            raise UserError("gigatoken is not installed: pip install 'remit-megatron[data]'") from None
        self.version = importlib.metadata.version("gigatoken")
        self._file = file
        self._load = gigatoken.Tokenizer.from_json
        self._tokenizer: Any = None
        self._begin()

    def _begin(self) -> None:
        """Load the tokenizer with an empty cache, the old one gone first."""
        self._tokenizer = None
        try:
            self._tokenizer = self._load(self._file.content)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"gigatoken cannot load {self._file.path}: {quote(str(error).splitlines()[0])}") from None
        self._resident, self._until_look = resident_bytes(), LOOK_BYTES

    def _bound_cache(self, texts: Sequence[str | bytes]) -> None:
        self._until_look -= sum(map(len, texts))
        if self._until_look > 0:
            return
        self._until_look = LOOK_BYTES
        if resident_bytes() - self._resident > CACHE_BYTES:
            self._begin()

    def encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See Backend."""
        self._bound_cache(texts)
        if len(texts) == 1 and len(texts[0]) >= LARGE_BYTES:
            ids = self._tokenizer.encode(texts[0])
            return ids, np.array([len(ids)], dtype=np.int64)
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        if bytes in set(map(type, texts)):
            texts = [text.encode() if isinstance(text, str) else text for text in texts]
        layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout.to_ListOffsetArray64(True)
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[: offsets[-1]], np.diff(offsets)


def resident_bytes() -> int:
    """Memory of this process, pages of mapped files included."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def backend_version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def open_backend(name: str, file: TokenizerFile) -> Backend:
    return Gigatoken(file) if name == "gigatoken" else HuggingFace(file)


@dataclass(frozen=True, slots=True)
class Choice:
    """The library that does the work."""

    backend: str
    why: str
    exact: str = ""
    """Characters on which gigatoken differs: texts with one of them are encoded by `tokenizers`."""


def choose_backend(wanted: str, file: TokenizerFile, sample: Sequence[str]) -> Choice:
    """Compare gigatoken with `tokenizers` on hostile texts, on characters and on a sample of the input.

    Raises UserError where `wanted` is gigatoken and it cannot be used.
    """
    if wanted == "tokenizers":
        return Choice("tokenizers", "asked for")
    try:
        difference, exact = _compare_on_characters(file)
        found = holder(exact)
        difference = difference or first_difference(file, [text for text in sample if not found(text)])
    except UserError as error:
        difference, exact = str(error), ""
    if difference is None:
        apart = f"; texts with one of {len(exact)} rare characters go to tokenizers" if exact else ""
        equal = f"equal to tokenizers on {len(sample)} documents of the input and on the hostile texts"
        return Choice("gigatoken", equal + apart, exact)
    if wanted == "gigatoken":
        raise UserError(f"--backend gigatoken: {difference}; use --backend auto or tokenizers")
    return Choice("tokenizers", difference)


@functools.lru_cache(maxsize=8)
def _compare_on_characters(file: TokenizerFile) -> tuple[str | None, str]:
    """(the first difference that no list of characters avoids, characters to avoid), the same for every input."""
    fast, right = Gigatoken(file), HuggingFace(file)
    characters = hostile_characters()
    exact = ""
    for start in range(0, len(characters), 64):
        some = [around(c) for c in characters[start : start + 64]]
        if not np.array_equal(fast.encode(["".join(some)])[0], right.encode(["".join(some)])[0]):
            apart = zip(characters[start:], _encode_apart(fast, some), _encode_apart(right, some), strict=False)
            exact += "".join(c for c, ids, right_ids in apart if not np.array_equal(ids, right_ids))
    # A normalizer joins characters, so what differs in one place may differ in others.
    is_local = json.loads(file.content).get("normalizer") is None and len(exact) <= MAX_EXACT
    avoided = set(exact) if is_local else set()
    runs = "".join(c for c in characters if c not in avoided)
    texts = [*HOSTILE_TEXTS, *added_token_texts(file), *(around(c) for c in exact if c not in avoided)]
    texts += [runs[start : start + 1000] for start in range(0, len(runs), 1000)]
    return first_difference(file, texts), exact if is_local else ""


def _encode_apart(backend: Backend, texts: Sequence[str]) -> list[np.ndarray]:
    ids, lengths = backend.encode(texts)
    return np.split(ids, np.cumsum(lengths)[:-1])


def holder(characters: str) -> Callable[[str | bytes], bool]:
    """A function that tells whether a text (bytes: UTF-8) holds one of some characters."""
    if not characters:
        return lambda text: False
    search = re.compile(f"[{re.escape(characters)}]").search
    leads = {c.encode()[:2] for c in characters}

    def holds(text: str | bytes) -> bool:
        if isinstance(text, bytes):
            return any(lead in text for lead in leads) and search(text.decode()) is not None
        return not text.isascii() and search(text) is not None

    return holds


def first_difference(file: TokenizerFile, texts: Sequence[str]) -> str | None:
    """Where gigatoken's ids first differ from those of `tokenizers`, in words, or None."""
    fast, right = Gigatoken(file), HuggingFace(file)
    for start in range(0, len(texts), 64):
        group = texts[start : start + 64]
        (ids, lengths), (right_ids, right_lengths) = fast.encode(group), right.encode(group)
        if np.array_equal(lengths, right_lengths) and np.array_equal(ids, right_ids):
            continue
        ends, right_ends = np.cumsum(lengths), np.cumsum(right_lengths)
        for text, got, expected in zip(
            group, np.split(ids, ends[:-1]), np.split(right_ids, right_ends[:-1]), strict=True
        ):
            if not np.array_equal(got, expected):
                return describe_difference(text, got, expected)
    return None


def describe_difference(text: str, got: np.ndarray, expected: np.ndarray) -> str:
    """One line that shows the first ids that differ."""
    shared = min(len(got), len(expected))
    differs = got[:shared] != expected[:shared]
    where = int(np.argmax(differs)) if differs.any() else shared
    return (
        f"gigatoken differs from tokenizers on {text[:40]!r}{'...' if len(text) > 40 else ''} at token {where}: "
        f"{got[where : where + 3].tolist()} instead of {expected[where : where + 3].tolist()}"
    )


def clip(text: str | bytes) -> str:
    """The first CHECK_CHARACTERS of a text, at least one character less than a cut character may need."""
    if isinstance(text, bytes):
        text = text[: 4 * CHECK_CHARACTERS].decode(errors="ignore")
    return text[:CHECK_CHARACTERS]


def added_token_texts(file: TokenizerFile) -> list[str]:
    """Texts with the tokenizer's added tokens in them, which both libraries match before anything else."""
    return [f"a{token}b {token} \n{token}{token}" for token in sorted(file.added_tokens)[:200]]


def hostile_characters() -> str:
    """Characters whose class differs between versions of Unicode, and more: all below U+20000 but surrogates and long
    runs of one kind (CJK, Hangul, private use), of which, as of what lies above, every 31st is here."""
    kinds = ((1, 0x3440), (0x4DC0, 0x4E40), (0xA000, 0xAC40), (0xD7A4, 0xD800), (0xF900, 0x17040), (0x18D00, 0x20000))
    codes = set(chain.from_iterable(range(low, high) for low, high in kinds))
    codes.update(code for code in range(0, 0x40000, 31) if not 0xD800 <= code < 0xE000)
    codes.update((*range(0x2F800, 0x2FA20), *range(0xE0000, 0xE01F0), 0xF0000, 0x10FFFD))
    return "".join(map(chr, sorted(codes)))


def around(c: str) -> str:
    """A character bare, after a space, a letter, a digit and a sign, before a letter and a line's end, and twice.

    With a tokenizer of many merges, a character of another class is another split in one of these places.
    """
    return f"{c} {c}x{c}1{c}.{c}{c} a{c}\n"


def limit_threads() -> None:
    """One thread a worker process: to be called before a tokenizer library is imported."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _load_hf(content: str, path: Path) -> Any:
    try:
        return parse_tokenizer(content)
    except ValueError as error:
        raise UserError(f"{path}: `tokenizers` cannot load it: {error}") from None
