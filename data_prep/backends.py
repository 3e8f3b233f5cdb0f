"""Two tokenizer libraries behind one call: gigatoken where it is exact, the Hugging Face `tokenizers` everywhere else.

`tokenizers` defines what is right. gigatoken is 30 times faster and reproduces it for most byte-level and
SentencePiece-style BPE; `choose_backend` uses it only after comparing both on the input itself, on the added tokens,
and on characters of every kind.
"""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from remit_megatron.data.tokenizer import parse_tokenizer, tokenizer_hash
from remit_megatron.errors import UserError

CHECK_CHARACTERS = 1 << 16
"""Of a document, as much as this is compared: `tokenizers` needs over 100 bytes of memory for each byte of text."""
HF_BATCH_BYTES = 1 << 20
LARGE_BYTES = 1 << 22
"""Texts from this size on are encoded one by one, which needs half the memory of a batch."""

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
    added_tokens: dict[str, int]

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
        content = file.read_text(encoding="utf-8")
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
            try:
                eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
            except (ValueError, AttributeError) as error:
                raise UserError(f"{config}: no valid JSON object: {error}") from None
            if eos:
                return eos.get("content") if isinstance(eos, dict) else eos
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
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(file.content)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"gigatoken cannot load {file.path}: {str(error).splitlines()[0][:200]}") from None

    def encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See Backend."""
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


def backend_version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def open_backend(name: str, file: TokenizerFile) -> Backend:
    return Gigatoken(file) if name == "gigatoken" else HuggingFace(file)


def choose_backend(wanted: str, file: TokenizerFile, sample: Sequence[str]) -> tuple[str, str]:
    """(backend, why) after comparing gigatoken with `tokenizers` on hostile texts and on a sample of the input.

    Raises UserError where `wanted` is gigatoken and it cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers", "asked for"
    try:
        difference = first_difference(file, [*HOSTILE_TEXTS, *added_token_texts(file), *character_texts(), *sample])
    except UserError as error:
        difference = str(error)
    if difference is None:
        return "gigatoken", f"equal to tokenizers on {len(sample)} documents of the input and on the hostile texts"
    if wanted == "gigatoken":
        raise UserError(f"--backend gigatoken: {difference}; use --backend auto or tokenizers")
    return "tokenizers", difference


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


def character_texts() -> list[str]:
    """Every character below U+20000 but surrogates, CJK, Hangul and private use, which behave alike."""
    kinds = ((1, 0x3440), (0x4DC0, 0x4E40), (0xA000, 0xAC40), (0xD7A4, 0xD800), (0xF900, 0x17040), (0x18D00, 0x20000))
    text = "".join(map(chr, chain.from_iterable(range(low, high) for low, high in kinds)))
    return [text[start : start + 1000] for start in range(0, len(text), 1000)]


def limit_threads() -> None:
    """One thread a worker process: to be called before a tokenizer library is imported."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _load_hf(content: str, path: Path) -> Any:
    try:
        return parse_tokenizer(content)
    except ValueError as error:
        raise UserError(f"{path}: `tokenizers` cannot load it: {error}") from None
