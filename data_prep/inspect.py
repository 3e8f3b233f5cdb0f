"""`remit data verify`, `stats` and `peek`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.data.index_cache import INDEX_FOLDER, cached_key, is_valid
from remit_megatron.data.indexed import IndexedTokens, bin_path, open_index
from remit_megatron.data.manifest import (
    Manifest,
    check_ends,
    fingerprint,
    manifest_path,
    quick_verify,
    verify_content,
)
from remit_megatron.data.tokenizer import load_tokenizer, tokenizer_hash
from remit_megatron.errors import UserError

PERCENTILES = (1, 10, 50, 90, 99)


def verify(
    prefix: str,
    *,
    full: bool = False,
    adopt: bool = False,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    eod_id: int | None = None,
) -> list[str]:
    """Check a dataset and return what to say of it. Raises UserError naming the first damage.

    full: read every byte. adopt: read every byte and write the manifest that is missing; `tokenizer` and `eod_id` are
    recorded in it, the EOD after a check that every document ends with it.
    """
    hash_ = tokenizer_hash(tokenizer) if tokenizer else None
    if eod_id is not None and not adopt:
        raise UserError("--eod-id goes with --adopt: another dataset's EOD is in its manifest")
    if adopt and manifest_path(prefix).exists():
        raise UserError(f"{manifest_path(prefix)}: exists already; without --adopt, `verify --full` checks against it")
    info = quick_verify(prefix, vocab_size=vocab_size, tokenizer_hash=None if adopt else hash_)
    lines = [] if adopt else list(info.warnings)
    if full or adopt:
        manifest, agrees = verify_content(prefix)
        if vocab_size is not None and manifest.largest_id >= vocab_size:
            raise UserError(
                f"{bin_path(prefix)}: token id {manifest.largest_id} is outside the vocabulary of {vocab_size}"
            )
        if adopt:
            adopted = _adopt(prefix, manifest, vocab_size, hash_, eod_id)
            lines.append(f"{manifest_path(prefix)}: written, fingerprint {fingerprint(adopted)[:12]}")
        elif agrees:
            lines.append(f"{prefix}: all {len(manifest.bin_sha256)} blocks have the manifest's SHA-256")
        info = dataclasses.replace(info, largest_id=manifest.largest_id)
    depth = "every byte read" if full or adopt else "quick check; --full reads every byte"
    return [*lines, f"{prefix}: sound: {info.num_documents:,} documents, {info.num_tokens:,} tokens, {info.dtype}, "
            f"largest id {info.largest_id} ({depth})", *_index_lines(prefix)]  # fmt: skip


def _index_lines(prefix: str) -> list[str]:
    """What to say of the sample indices beside a dataset. None can harm: a run uses what is whole and its own."""
    current, other = quick_verify(prefix).fingerprint, 0
    lines = []
    for folder in sorted((Path(prefix).parent / INDEX_FOLDER).glob("[0-9a-f]*")):
        key = cached_key(folder)
        if not is_valid(folder):
            if key is None or key.get("dataset") == current:
                lines.append(f"{folder}: a damaged sample index; a run that needs it builds it again")
        elif key is not None and key.get("dataset") == current:
            lines.append(
                f"{folder}: a whole sample index of this dataset, {key.get('sequence_length')} tokens a sample"
            )
        else:
            other += 1
    if other:
        lines.append(f"{Path(prefix).parent / INDEX_FOLDER}: {other} sample indices of other data, which no run over "
                     "this dataset uses")  # fmt: skip
    return lines


def _adopt(prefix: str, found: Manifest, vocab_size: int | None, hash_: str | None, eod_id: int | None) -> Manifest:
    if eod_id is not None:
        check_ends(open_index(prefix), eod_id)
    manifest = found.model_copy(
        update={
            "vocab_size": vocab_size,
            "tokenizer_hash": hash_,
            "eod_id": eod_id,
            "provenance": {"command": "adopt"},
        }
    )
    manifest.write(prefix)
    return manifest


def stats(prefix: str) -> dict[str, Any]:
    """Counts, sizes and the distribution of document lengths in tokens, as JSON-ready values."""
    info = quick_verify(prefix)
    indexed = open_index(prefix)
    lengths = _document_lengths(indexed)
    return {
        "prefix": prefix,
        "tokens": info.num_tokens,
        "documents": info.num_documents,
        "dtype": info.dtype.name,
        "bin_bytes": indexed.tokens.nbytes,
        "largest_id": info.largest_id,
        "eod_id": info.eod_id,
        "tokenizer_hash": info.tokenizer_hash,
        "fingerprint": info.fingerprint,
        "document_tokens": {
            "mean": round(float(lengths.mean()), 2),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            **{f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES},
        },
        "warnings": list(info.warnings),
    }


def _document_lengths(indexed: IndexedTokens) -> np.ndarray:
    """Tokens of each document, [documents] int64."""
    ends = np.concatenate([[0], np.cumsum(indexed.lengths, dtype=np.int64)])
    return np.diff(ends[indexed.marks])


def peek(prefix: str, document: int, *, tokenizer: str | None = None, max_tokens: int = 256) -> str:
    """Ids of a document, and its text where a tokenizer is named. Raises UserError for one of another tokenizer."""
    info = quick_verify(prefix, tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer else None)
    ids = open_index(prefix).document(document)
    shown = ids[:max_tokens].tolist()
    more = f" (the first {max_tokens})" if len(ids) > max_tokens else ""
    lines = [f"document {document} of {info.num_documents}: {len(ids)} tokens{more}", " ".join(map(str, shown))]
    if tokenizer:
        lines.append(load_tokenizer(tokenizer, "--tokenizer").decode(shown, skip_special_tokens=False))
    else:
        lines.append("(name --tokenizer to see the text)")
    return "\n".join(lines)
