"""Long documents encoded in pieces, so that memory does not grow with them, where that gives the same ids.

A piece ends after a newline that follows a printable ASCII character and comes before an ASCII letter. Tokenizers whose
pre-tokenizer splits text by a pattern begin a new word there whatever stands around it, and their merges never
cross words. `safe_to_cut` asks the tokenizer itself, in every pair of hostile contexts; others take a document whole.
"""

import json
import re
from collections.abc import Iterator

import numpy as np

from data_prep.backends import HOSTILE_TEXTS, Backend, TokenizerFile, added_token_texts

PIECE_BYTES = 1 << 20
BOUNDARY = re.compile(rb"[!-~]\n(?=[A-Za-z])")
LEFT = ("x", "9", ".", "}", "'", "/", ")", "_")
RIGHT = ("a", "Z", "s ", "ll ", "The quick", "def f(x):")


def pieces(text: bytes, size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Consecutive pieces of at least `size` bytes, but for the last; where a text has no place to cut, it is one."""
    start = 0
    while len(text) - start > 2 * size:
        found = BOUNDARY.search(text, start + size)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def safe_to_cut(file: TokenizerFile, backend: Backend) -> bool:
    """Whether ids of pieces are those of the whole text, by structure and by trial."""
    content = json.loads(file.content)
    normalizer = (content.get("normalizer") or {}).get("type")
    if not _splits_by_pattern(content.get("pre_tokenizer")) or normalizer not in (None, "NFC"):
        return False
    if any("\n" in token or (token.isascii() and token.isalpha()) for token in file.added_tokens):
        return False
    contexts = [text[-200:] for text in (*HOSTILE_TEXTS, *added_token_texts(file)[:8])]
    lefts = [text + end + "\n" for text in contexts for end in LEFT]
    rights = [begin + text for text in contexts for begin in RIGHT]
    pairs = [(left, rights[(7 * n + 3 * k) % len(rights)]) for n, left in enumerate(lefts) for k in range(4)]
    whole, _ = backend.encode([left + right for left, right in pairs])
    apart, _ = backend.encode([side for pair in pairs for side in pair])
    return np.array_equal(whole, apart)


def _splits_by_pattern(pre_tokenizer: dict[str, object] | None) -> bool:
    """Byte-level, with nothing put before the text and a split by a pattern that looks at nothing behind it."""
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    assert isinstance(parts, list)
    splits = False
    for part in parts:
        if part["type"] == "Split":
            pattern = part["pattern"].get("Regex")
            if pattern is None or any(
                mark in pattern.replace("[^", "") for mark in ("(?<", "\\b", "\\B", "\\A", "\\G", "^")
            ):
                return False
            splits = True
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            splits = splits or bool(part["use_regex"])
        else:
            return False
    return splits
