"""`remit data merge`: datasets of one tokenizer joined in the order given, every block checked on the way."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.work import check_prefix, claimed, made_before, same_value
from data_prep.writer import CHUNK, DatasetWriter
from remit_megatron.data.indexed import IndexedTokens, bin_path, idx_path, open_index
from remit_megatron.data.manifest import Manifest, fingerprint, manifest_path, quick_verify
from remit_megatron.data.tokenizer import fullest
from remit_megatron.errors import UserError


def merge(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> Manifest:
    """Write the concatenation of datasets as a new one and return its manifest.

    Shards of one `tokenize --shard` run must be complete and in order; the result then equals the run without shards.
    Raises UserError for datasets that do not fit together, that have no manifest, or that are damaged.
    """
    refuse_own_source(output, prefixes)
    sources = [(open_index(prefix), owned_manifest(prefix)) for prefix in prefixes]
    first = sources[0][1]
    tokenizer = fullest([manifest.tokenizer_hash for _, manifest in sources])
    for (_, manifest), prefix in zip(sources, prefixes, strict=True):
        for name in ("dtype", "tokenizer_hash", "eod_id", "vocab_size"):
            found, wanted = getattr(manifest, name), tokenizer if name == "tokenizer_hash" else getattr(first, name)
            if not same_value(name, found, wanted):
                other = next(p for (_, m), p in zip(sources, prefixes, strict=True) if getattr(m, name) == wanted)
                raise UserError(
                    f"{manifest_path(prefix)}: {name} is {found}, but {other} has {wanted}: only datasets made alike "
                    "can be merged"
                )
    shards = _check_shards(prefixes, [manifest for _, manifest in sources])
    identity: dict[str, Any] = {"eod_id": first.eod_id, "tokenizer_hash": tokenizer}
    provenance = _provenance(prefixes, [manifest for _, manifest in sources], shards)
    dtype = np.dtype(first.dtype)
    with claimed(output) as folder:
        if (made := made_before(output, folder, {**identity, **provenance}, overwrite)) is not None:
            return made
        writer = DatasetWriter(output, folder, vocab_size=first.vocab_size or int(np.iinfo(dtype).max), dtype=dtype)
        try:
            for indexed, manifest in sources:
                _append(writer, indexed, manifest)
            return writer.commit(provenance=provenance, **identity)
        finally:
            writer.abandon()


def owned_manifest(prefix: str) -> Manifest:
    """The manifest of a verified dataset of one sequence a document. Raises UserError where there is none."""
    quick_verify(prefix)
    manifest = Manifest.read(prefix)
    if manifest is None:
        raise UserError(f"{prefix}: no manifest; `remit data verify --adopt {prefix}` writes one after a full check")
    if manifest.num_sequences != manifest.num_documents:
        counts = f"{manifest.num_sequences} sequences in {manifest.num_documents} documents"
        raise UserError(f"{idx_path(prefix)}: {counts}; only one sequence a document is supported")
    return manifest


def refuse_own_source(output: str, sources: Sequence[str]) -> None:
    """Raise UserError where the output is a dataset that is read, however its path is spelt, or no dataset's name."""
    check_prefix(output)
    if any(idx_path(source).resolve() == idx_path(output).resolve() for source in sources):
        raise UserError(f"--output {output} is a dataset that is read: choose another name")


def _append(writer: DatasetWriter, indexed: IndexedTokens, manifest: Manifest) -> None:
    for start in range(0, len(indexed.lengths), CHUNK):
        writer.append_raw(indexed.tokens[:0], indexed.lengths[start : start + CHUNK])
    step = manifest.block_bytes // indexed.dtype.itemsize
    for number, start in enumerate(range(0, indexed.num_tokens, step)):
        block = indexed.tokens[start : start + step]
        if hashlib.sha256(block.data).hexdigest() != manifest.bin_sha256[number]:
            raise UserError(
                f"{bin_path(indexed.prefix)}: block {number} does not have the manifest's SHA-256: it was damaged or "
                "replaced; copy the dataset again, or make it again"
            )
        writer.append_raw(block, indexed.lengths[:0])
    writer.largest_id = max(writer.largest_id, manifest.largest_id)


def _check_shards(prefixes: Sequence[str], manifests: list[Manifest]) -> bool:
    """Whether these are all shards of one run, in order. Raises UserError for some of them, or another order."""
    shards = [manifest.provenance.get("shard") for manifest in manifests]
    if not any(shards):
        return False
    count = next(shard[1] for shard in shards if shard)
    expected = [[index, count] for index in range(count)]
    runs = [_run_of(manifest) for manifest in manifests]
    if shards != expected:
        found = [f"{shard[0]}/{shard[1]}" if shard else "none" for shard in shards]
        raise UserError(
            f"{prefixes[0]} and others: shards {', '.join(found)}, but 0/{count} to {count - 1}/{count} in this order "
            "are needed; make the missing ones, or name them in order"
        )
    other = next((prefix for prefix, run in zip(prefixes, runs, strict=True) if run != runs[0]), None)
    if other is not None:
        raise UserError(
            f"{manifest_path(other)}: a shard of other input than {prefixes[0]}, or divided otherwise: make all of "
            "them with one command and version"
        )
    return True


def _run_of(manifest: Manifest) -> list[Any]:
    """What the shards of one run have in common: the input, wherever it lay, and how it was divided."""
    made = manifest.provenance
    inputs = [{key: value for key, value in source.items() if key != "path"} for source in made.get("inputs", [])]
    return [inputs, made.get("text_key"), made.get("piece_bytes")]


def _provenance(prefixes: Sequence[str], manifests: list[Manifest], shards: bool) -> dict[str, Any]:
    sources = [
        {"prefix": prefix, "fingerprint": fingerprint(manifest), "tokens": manifest.num_tokens,
         "provenance": manifest.provenance}
        for prefix, manifest in zip(prefixes, manifests, strict=True)
    ]  # fmt: skip
    return {"command": "merge", "shards": shards, "sources": sources}
