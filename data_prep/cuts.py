"""Long documents encoded in pieces, so that memory does not grow with them, where that gives the same ids.

A piece begins with an ASCII letter after a newline, or with a space and an ASCII letter, and the piece before it ends
with a printable ASCII character (and the newline). Tokenizers whose pre-tokenizer splits text by a pattern begin a new
word there whatever stands around it, and their merges never cross words. `safe_to_cut` asks the tokenizer itself, in
pairs of hostile contexts; others take a document whole.
"""

import json
import re
from collections.abc import Iterator

import numpy as np

from data_prep.backends import HOSTILE_TEXTS, Backend, TokenizerFile, added_token_texts

PIECE_BYTES = 1 << 20
HF_PIECE_BYTES = 1 << 18
"""`tokenizers` needs some 300 bytes for each byte of a text while it splits it twice."""
BOUNDARY = re.compile(rb"[!-~](?:\n(?=[A-Za-z])|(?= [A-Za-z]))")
NORMALIZERS = (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer")
"""Those that change no ASCII letter or newline for what stands beside it."""
SPLITTERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation")
"""Pre-tokenizers that look at one character; the first three split at every white space."""
CHARACTER_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
LEFT = ("x", "9", ".", "}", "'", "/", ")", "_")
BETWEEN = (("\n", ""), ("", " "), ("\n", ""), ("", " "))
"""What stands between two sides of a trial, before the cut and after it."""
RIGHT = ("a", "Z", "s ", "ll ", "The quick", "def f(x):")


def pieces(text: bytes, size: int) -> Iterator[bytes]:
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
    if not _splits_by_pattern(content.get("pre_tokenizer")) or normalizer not in NORMALIZERS:
        return False
    # Added tokens are matched before anything is split: none may reach over a cut, or take the space after it.
    if any(set(token) & set(" \n") or (token.isascii() and token.isalpha()) for token in file.added_tokens):
        return False
    if any(token.get("lstrip") or token.get("rstrip") for token in content.get("added_tokens", [])):
        return False
    contexts = [text[-200:] for text in (*HOSTILE_TEXTS, *added_token_texts(file)[:8])]
    lefts = [text + end for text in contexts for end in LEFT]
    rights = [begin + text for text in contexts for begin in RIGHT]
    pairs = [
        (left + between[0], between[1] + rights[(7 * n + 3 * k) % len(rights)])
        for n, left in enumerate(lefts)
        for k, between in enumerate(BETWEEN)
    ]
    whole, _ = backend.encode([left + right for left, right in pairs])
    apart, _ = backend.encode([side for pair in pairs for side in pair])
    return np.array_equal(whole, apart)


def _splits_by_pattern(pre_tokenizer: dict[str, object] | None) -> bool:
    """Nothing is put before the text; it is split at white space, or by a pattern that looks at nothing behind it."""
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    assert isinstance(parts, list)
    splits = False
    for part in parts:
        if part["type"] == "Split":
            pattern = part["pattern"].get("Regex")
            outside = CHARACTER_CLASS.sub("[]", pattern or "")
            if pattern is None or any(mark in outside for mark in ("(?<", "\\b", "\\B", "\\A", "\\G", "^")):
                return False
            splits = True
        elif part["type"] in SPLITTERS:
            splits = splits or part["type"] in SPLITTERS[:3]
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space", True):
            splits = splits or bool(part.get("use_regex", True))  # older files lack it
        else:
            return False
    return splits
