"""`remit data select`: MiniPLM's difference sampling over the documents of a dataset.

The score of a document is mean NLL(small) - mean NLL(large): what a large model predicts better than a small one. One
global sort keeps the best share of documents, in the order of the dataset. Baseline `miniplm` trains on the result.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.merge import owned_manifest, refuse_own_source
from data_prep.work import claimed, made_before
from data_prep.writer import CHUNK, DatasetWriter
from remit_megatron.data.files import write_atomically
from remit_megatron.data.indexed import IndexedTokens, open_index
from remit_megatron.data.manifest import Manifest, fingerprint
from remit_megatron.errors import UserError
from remit_megatron.outside import quote, read_object


def select(
    prefix: str,
    *,
    large: Path,
    small: Path,
    keep: float = 0.8,
    by: Literal["documents", "tokens"] = "documents",
    output: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Keep the documents of the largest score, of equal ones the earlier: int(keep x documents) of them, or by tokens
    as many as hold no more than that share of all tokens.

    large, small: .npy of NLLs in nats, [documents] (means) or [tokens] in the order of .bin (NaN: not scored; the
    mean is over the rest). A file X.npy.json with `fingerprint` ties scores to a dataset and is checked.
    Writes `output` and OUTPUT.select.json, and returns the latter's content. Raises UserError for scores that do not
    fit the dataset.
    """
    if not 0 < keep <= 1:
        raise UserError(f"--keep {keep}: a share between 0 and 1 is expected")
    refuse_own_source(output, [prefix])
    manifest, indexed = owned_manifest(prefix), open_index(prefix)
    large_nll, large_tied = _mean_nll(large, indexed, manifest)
    small_nll, small_tied = _mean_nll(small, indexed, manifest)
    kept = difference_sampling(large_nll, small_nll, keep, lengths=indexed.lengths if by == "tokens" else None)
    unscored = np.isnan(small_nll - large_nll)
    if (kept & unscored).any():
        raise UserError(
            f"--keep {keep} keeps documents without a score, of which there are {unscored.sum():,} of {len(kept):,}: "
            "score them too, or lower --keep"
        )
    report = _report(indexed, large_nll, small_nll, kept)
    report |= {"prefix": prefix, "fingerprint": fingerprint(manifest), "large": str(large), "small": str(small),
               "scores_tied_to_dataset": large_tied and small_tied, "keep": keep, "keep_of": by}  # fmt: skip
    provenance = {"command": "select", "select": report, "source": manifest.provenance}
    _write(indexed, kept, manifest, provenance, output, overwrite)
    return report


def _write(
    indexed: IndexedTokens,
    kept: np.ndarray,
    manifest: Manifest,
    provenance: dict[str, Any],
    output: str,
    overwrite: bool,
) -> None:
    identity: dict[str, Any] = {"eod_id": manifest.eod_id, "tokenizer_hash": manifest.tokenizer_hash}
    text = (json.dumps(provenance["select"], indent=1) + "\n").encode()
    with claimed(output) as folder:
        if made_before(output, folder, {**identity, **provenance}, overwrite) is not None:
            beside = Path(f"{output}.select.json")
            if not beside.exists():  # an older version wrote it last
                write_atomically(beside, text)
            return
        dtype = np.dtype(manifest.dtype)
        vocab_size = manifest.vocab_size or int(np.iinfo(dtype).max)
        writer = DatasetWriter(output, folder, vocab_size=vocab_size, dtype=dtype)
        try:
            for tokens, lengths in _runs(indexed, kept):
                writer.append(tokens, lengths)
            write_atomically(folder / "all.select", text)
            writer.commit(provenance=provenance, **identity)
        finally:
            writer.abandon()


def difference_sampling(
    large_nll: np.ndarray, small_nll: np.ndarray, keep: float, *, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Documents to keep, bool [documents], from mean NLLs in nats [documents].

    lengths: tokens of each document [documents]; with them `keep` is a share of the tokens, else of the documents.
    """
    best = np.argsort(large_nll - small_nll, kind="stable")  # what has no score is last
    if lengths is None:
        count = int(keep * len(best))
    else:
        ends = np.cumsum(lengths[best], dtype=np.int64)
        count = int(np.searchsorted(ends, keep * ends[-1], side="right"))
    if not count:
        raise UserError(f"--keep {keep} of {len(best)} documents keeps none: raise it")
    kept = np.zeros(len(best), dtype=bool)
    kept[best[:count]] = True
    return kept


def _mean_nll(path: Path, indexed: IndexedTokens, manifest: Manifest) -> tuple[np.ndarray, bool]:
    """(mean NLL of each document [documents] float64, whether the scores name this dataset)."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - numpy evaluates the header as Python, and raises what that raises
        raise UserError(f"{quote(str(path))}: no readable .npy of scores: {quote(str(error))}") from None
    if values.dtype.kind != "f" or values.ndim != 1 or len(values) not in (indexed.num_documents, indexed.num_tokens):
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape}; floats for each of {indexed.num_documents} documents or "
            f"{indexed.num_tokens} tokens are expected: score this dataset"
        )
    sidecar = Path(f"{path}.json")
    tied = sidecar.exists()
    if tied:
        named = read_object(sidecar).get("fingerprint")
        if named != fingerprint(manifest):
            raise UserError(f"{sidecar}: scores of the dataset {quote(str(named)[:12])}, not of {indexed.prefix} "
                            f"({fingerprint(manifest)[:12]}): score this dataset")  # fmt: skip
    means = values.astype(np.float64) if len(values) == indexed.num_documents else _document_means(values, indexed)
    by_document = len(values) == indexed.num_documents
    broken = ~np.isfinite(means) if by_document else np.isinf(means)  # a document may have no scored token
    if broken.any():
        where = int(np.argmax(broken))
        raise UserError(f"{path}: document {where} has the score {means[where]}: score it again")
    return means, tied


def _document_means(values: np.ndarray, indexed: IndexedTokens) -> np.ndarray:
    means = np.empty(indexed.num_documents)
    for start, ends in _chunks_of_documents(indexed):
        first = int(indexed.pointers[start]) // indexed.dtype.itemsize
        part = values[first : first + int(ends[-1])].astype(np.float64)
        scored = ~np.isnan(part)
        offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        there = ends > offsets  # an empty document has no score; reduceat would give it its neighbour's
        chunk = np.full(len(ends), np.nan)
        with np.errstate(invalid="ignore"):
            sums = np.add.reduceat(np.where(scored, part, 0.0), offsets[there])
            chunk[there] = sums / np.add.reduceat(scored.astype(np.int64), offsets[there])
        means[start : start + len(ends)] = chunk
    return means


def _chunks_of_documents(indexed: IndexedTokens) -> Iterator[tuple[int, np.ndarray]]:
    """(first document, ends of its and the following documents' tokens counted from its start), about CHUNK tokens."""
    start = 0
    while start < indexed.num_documents:
        ends = np.cumsum(indexed.lengths[start : start + 4096], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, CHUNK, side="right")))
        yield start, ends[:count]
        start += count


def _runs(indexed: IndexedTokens, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of the documents kept, in order."""
    for start, ends in _chunks_of_documents(indexed):
        first = int(indexed.pointers[start]) // indexed.dtype.itemsize
        lengths = indexed.lengths[start : start + len(ends)]
        chosen = kept[start : start + len(ends)]
        tokens = indexed.tokens[first : first + int(ends[-1])]
        yield tokens[np.repeat(chosen, lengths)], lengths[chosen]


def _report(indexed: IndexedTokens, large_nll: np.ndarray, small_nll: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    score = small_nll - large_nll
    lengths = indexed.lengths.astype(np.int64)

    def side(chosen: np.ndarray) -> dict[str, Any]:
        count = int(chosen.sum())
        figures: dict[str, Any] = {"documents": count, "tokens": int(lengths[chosen].sum())}
        if count:
            means = {"score_mean": score, "large_nll_mean": large_nll, "small_nll_mean": small_nll}
            scored = chosen & ~np.isnan(score)
            figures |= {name: float(values[scored].mean()) for name, values in means.items() if scored.any()}
        return figures

    unscored = int(np.isnan(score).sum())
    return {
        "threshold": float(score[kept].min()),
        "unscored_documents": unscored,
        "kept": side(kept),
        "dropped": side(~kept),
    }
