"""What a dataset is: PREFIX.manifest.json beside PREFIX.bin and PREFIX.idx, and the checks made before training.

The manifest holds checksums of both files, so that data, caches and checkpoints are matched by content. `quick_verify`
is what a training run does at start: everything about .idx, the sizes, and samples of .bin. `verify_content` reads all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remit_megatron.data.checksums import own_checksum, write_record
from remit_megatron.data.indexed import IndexedTokens, bin_path, idx_path, open_index
from remit_megatron.data.tokenizer import same_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.outside import problem, read_object

FORMAT = 1
BLOCK_BYTES = 64 << 20
SCAN_BYTES = 256 << 20
"""A .bin without manifest is read whole at start up to this size."""
SAMPLE_BYTES = 1 << 20
SAMPLES = 64


class Manifest(BaseModel):
    """Identity and provenance of one dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    format: int = FORMAT
    tool: str
    """Program and version that wrote the manifest."""
    dtype: str
    num_tokens: int = Field(ge=0)
    num_documents: int = Field(ge=0)
    num_sequences: int = Field(ge=0)
    largest_id: int = Field(ge=0)
    vocab_size: int | None = None
    """Rows of the vocabulary that the dataset was made for; none in an adopted dataset."""
    eod_id: int | None = None
    """The token that ends every document; none where documents have no such end."""
    tokenizer_hash: str | None = None
    bin_bytes: int = Field(ge=0)
    block_bytes: int = Field(gt=0, multiple_of=4)
    bin_sha256: list[str]
    """SHA-256 of each block of .bin, in order; the last one may be shorter."""
    idx_sha256: str
    provenance: dict[str, Any] = {}
    """What the dataset was made of and how."""

    def write(self, prefix: str | Path) -> None:
        """Write the file durably, with a checksum of its own. Raises RunError where it cannot be written."""
        write_record(manifest_path(prefix), self.model_dump())

    @staticmethod
    def read(prefix: str | Path) -> "Manifest | None":
        """The manifest of a dataset, or None where there is none. Raises UserError for a damaged one."""
        path = manifest_path(prefix)
        return Manifest.load(path) if os.path.exists(path) else None  # no error for a name that is too long

    @staticmethod
    def load(path: Path) -> "Manifest":
        """The manifest in a file. Raises UserError where it is missing, damaged or of another format."""
        remedy = "delete it and run `remit data verify --adopt` on a dataset that you trust, or make the dataset again"
        try:
            content = read_object(path)
            checksum = content.pop("checksum", None)
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: no valid manifest ({problem(error)}); {remedy}") from None
        except UserError as error:
            raise UserError(f"{error}: no valid manifest; {remedy}") from None
        if manifest.format != FORMAT:
            raise UserError(f"{path}: format {manifest.format} is unknown, {FORMAT} is expected; {remedy}")
        if checksum != own_checksum(content):
            raise UserError(f"{path}: its own checksum does not match, so it was damaged or edited; {remedy}")
        return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What a training run knows of a verified dataset."""

    prefix: str
    num_tokens: int
    num_documents: int
    dtype: np.dtype
    largest_id: int
    """Largest token id; a lower bound where a warning says that it was sampled."""
    eod_id: int | None
    fingerprint: str
    """64 hex digits of the content; see `fingerprint`."""
    tokenizer_hash: str | None
    warnings: tuple[str, ...]


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def fingerprint(manifest: Manifest) -> str:
    """Identity by content, 64 hex digits: equal for equal .bin and .idx, wherever they lie and whoever made them."""
    content = {"dtype": manifest.dtype, "idx": manifest.idx_sha256, "bin": manifest.bin_sha256}
    return hashlib.sha256(json.dumps([FORMAT, manifest.block_bytes, content], sort_keys=True).encode()).hexdigest()


def quick_verify(prefix: str, *, vocab_size: int | None = None, tokenizer_hash: str | None = None) -> DatasetInfo:
    """Check a dataset before training: structure of .idx, sizes, manifest, vocabulary and tokenizer.

    With a manifest, .idx is hashed whole and .bin by its first and last block. Without one, a warning says so, ids are
    scanned (up to SCAN_BYTES, else sampled, which a warning says), and the fingerprint covers what was read.
    Raises UserError naming the file and the remedy.
    """
    indexed = open_index(prefix)
    manifest = Manifest.read(prefix)
    if manifest is None:
        info = _info_without_manifest(indexed)
    else:
        _check_counts(indexed, manifest)
        _check_idx_sum(indexed, manifest)
        for block in sorted({0, len(manifest.bin_sha256) - 1}):
            _check_block(indexed, manifest, block)
        info = DatasetInfo(
            prefix=indexed.prefix,
            num_tokens=indexed.num_tokens,
            num_documents=indexed.num_documents,
            dtype=indexed.dtype,
            largest_id=manifest.largest_id,
            eod_id=manifest.eod_id,
            fingerprint=fingerprint(manifest),
            tokenizer_hash=manifest.tokenizer_hash,
            warnings=(),
        )
    _check_vocabulary(info, vocab_size)
    return _check_tokenizer(info, tokenizer_hash)


def verify_content(prefix: str, progress: Callable[[int], None] = lambda tokens: None) -> tuple[Manifest, bool]:
    """Read every byte. Returns a manifest computed from the files, and whether one lay beside them and agrees.

    `progress` is called with the number of tokens that each step read. The manifest returned takes vocabulary, EOD,
    tokenizer and provenance from the one on disk. Raises UserError for damage or for ids that no tokenizer gives.
    """
    indexed, manifest = open_index(prefix), Manifest.read(prefix)
    if manifest is not None:
        _check_counts(indexed, manifest)
        _check_idx_sum(indexed, manifest)
    block_bytes = manifest.block_bytes if manifest else BLOCK_BYTES
    step = block_bytes // indexed.dtype.itemsize
    sums, largest = [], 0
    for number, start in enumerate(range(0, indexed.num_tokens, step)):
        block = indexed.tokens[start : start + step]
        sums.append(hashlib.sha256(block.data).hexdigest())
        if manifest is not None and sums[-1] != manifest.bin_sha256[number]:
            raise _changed_block(indexed, number, block_bytes)
        largest = max(largest, _largest(indexed, block, start))
        progress(len(block))
    if manifest is not None and largest != manifest.largest_id:
        raise UserError(
            f"{manifest_path(prefix)}: says that the largest id is {manifest.largest_id}, in fact it is {largest}; "
            "delete it and run `remit data verify --adopt`"
        )
    if manifest is not None and manifest.eod_id is not None:
        check_ends(indexed, manifest.eod_id)
    if manifest is not None:
        return manifest, True
    found = Manifest(
        tool=tool_name(),
        dtype=indexed.dtype.name,
        num_tokens=indexed.num_tokens,
        num_documents=indexed.num_documents,
        num_sequences=len(indexed.lengths),
        largest_id=largest,
        bin_bytes=indexed.num_tokens * indexed.dtype.itemsize,
        block_bytes=block_bytes,
        bin_sha256=sums,
        idx_sha256=file_sha256(idx_path(prefix)),
    )
    return found, False


def check_ends(indexed: IndexedTokens, eod_id: int) -> None:
    """Every document ends with `eod_id`. Raises UserError naming the first that does not."""
    chunk = 1 << 20
    for start in range(0, indexed.num_documents, chunk):
        after = np.minimum(indexed.marks[start + 1 : start + 1 + chunk], len(indexed.lengths)) - 1
        filled = np.diff(indexed.marks[start : start + 1 + chunk]) > 0
        last = after[filled]
        ends = indexed.pointers[last] // indexed.dtype.itemsize + indexed.lengths[last] - 1
        wrong = (indexed.lengths[last] == 0) | (indexed.tokens[ends] != eod_id)
        if wrong.any():
            document = start + int(np.flatnonzero(filled)[np.argmax(wrong)])
            raise UserError(
                f"{bin_path(indexed.prefix)}: document {document} does not end with the EOD token {eod_id}; "
                "make the dataset again with --append-eod, or adopt it without --eod-id"
            )


def tool_name() -> str:
    """Name and version as manifests record them."""
    from remit_megatron import __version__

    return f"remit-megatron {__version__}"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_counts(indexed: IndexedTokens, manifest: Manifest) -> None:
    found = {
        "dtype": indexed.dtype.name,
        "num_tokens": indexed.num_tokens,
        "num_documents": indexed.num_documents,
        "num_sequences": len(indexed.lengths),
        "bin_bytes": indexed.num_tokens * indexed.dtype.itemsize,
    }
    for name, value in found.items():
        if getattr(manifest, name) != value:
            raise UserError(
                f"{idx_path(indexed.prefix)}: {name} is {value}, but {manifest_path(indexed.prefix).name} says "
                f"{getattr(manifest, name)}: the files do not belong together; copy all three again, or make them again"
            )
    if len(manifest.bin_sha256) != -(-manifest.bin_bytes // manifest.block_bytes):
        raise UserError(
            f"{manifest_path(indexed.prefix)}: holds {len(manifest.bin_sha256)} block checksums for "
            f"{manifest.bin_bytes:,} bytes in blocks of {manifest.block_bytes:,}; make the dataset again"
        )


def _check_idx_sum(indexed: IndexedTokens, manifest: Manifest) -> None:
    if file_sha256(idx_path(indexed.prefix)) != manifest.idx_sha256:
        raise UserError(
            f"{idx_path(indexed.prefix)}: its SHA-256 is not the manifest's, so it was damaged or replaced; "
            "copy all three files again, or make them again"
        )


def _check_block(indexed: IndexedTokens, manifest: Manifest, number: int) -> None:
    step = manifest.block_bytes // indexed.dtype.itemsize
    block = indexed.tokens[number * step : (number + 1) * step]
    if hashlib.sha256(block.data).hexdigest() != manifest.bin_sha256[number]:
        raise _changed_block(indexed, number, manifest.block_bytes)


def _changed_block(indexed: IndexedTokens, number: int, block_bytes: int) -> UserError:
    return UserError(
        f"{bin_path(indexed.prefix)}: the {block_bytes >> 20} MiB block {number} does not have the manifest's SHA-256, "
        "so it was damaged or replaced; copy all three files again, or make them again"
    )


def _largest(indexed: IndexedTokens, tokens: np.ndarray, start: int) -> int:
    if indexed.dtype.kind == "i" and tokens.min() < 0:
        where = start + int(np.argmax(tokens < 0))
        raise UserError(f"{bin_path(indexed.prefix)}: token {where} is {indexed.tokens[where]}; ids are never negative")
    return int(tokens.max())


def _info_without_manifest(indexed: IndexedTokens) -> DatasetInfo:
    warnings = [
        f"{indexed.prefix}: no manifest, so damage inside .bin goes unseen; "
        f"`remit data verify --adopt {indexed.prefix}` reads it once and writes one; not between the starts of a run, "
        "which knows the dataset by another name then"
    ]
    step = SAMPLE_BYTES // indexed.dtype.itemsize
    starts = np.arange(0, indexed.num_tokens, step)
    if indexed.tokens.nbytes > SCAN_BYTES:
        starts = np.unique(np.linspace(0, indexed.num_tokens - step, SAMPLES).astype(np.int64))
        warnings.append(
            f"{indexed.prefix}: the largest id and the fingerprint come from {SAMPLES} samples of "
            f"{SAMPLE_BYTES >> 20} MiB"
        )
    content = hashlib.sha256(f"without manifest {indexed.dtype} {indexed.num_tokens} ".encode())
    content.update(file_sha256(idx_path(indexed.prefix)).encode())
    largest = 0
    for start in starts.tolist():
        part = indexed.tokens[start : start + step]
        content.update(part.data)
        largest = max(largest, _largest(indexed, part, start))
    return DatasetInfo(
        prefix=indexed.prefix,
        num_tokens=indexed.num_tokens,
        num_documents=indexed.num_documents,
        dtype=indexed.dtype,
        largest_id=largest,
        eod_id=None,
        fingerprint=content.hexdigest(),
        tokenizer_hash=None,
        warnings=tuple(warnings),
    )


def _check_vocabulary(info: DatasetInfo, vocab_size: int | None) -> None:
    if vocab_size is not None and info.largest_id >= vocab_size:
        raise UserError(
            f"{bin_path(info.prefix)}: token id {info.largest_id} is outside the model's vocabulary of {vocab_size} "
            "(ids 0 to vocab_size - 1): use data made with the model's own tokenizer"
        )


def _check_tokenizer(info: DatasetInfo, wanted: str | None) -> DatasetInfo:
    if wanted is None:
        return info
    if info.tokenizer_hash is not None:
        if same_tokenizer(wanted, info.tokenizer_hash):
            return info
        raise UserError(
            f"{manifest_path(info.prefix)}: made with the tokenizer {info.tokenizer_hash[:12]}, not with the one "
            f"named, {wanted[:12]}: tokenize the text again, or name the tokenizer that made it"
        )
    unknown = f"{info.prefix}: nothing says which tokenizer made it, so data.tokenizer could not be compared"
    return replace(info, warnings=(*info.warnings, unknown))


def end_of_document(infos: Sequence[DatasetInfo], given: int | None) -> int | None:
    """The token that ends a document: `given`, else what the manifests say. Raises UserError where these differ."""
    found = {info.eod_id for info in infos} if given is None else {given}
    if len(found) > 1:
        raise UserError(
            f"the datasets end their documents with different tokens {sorted(map(str, found))}: set data.eod_id"
        )
    return found.pop()
