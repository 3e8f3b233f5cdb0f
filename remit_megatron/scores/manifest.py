"""What scores on disk belong to, and whether two of them may stand for each other."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from remit_megatron.data.files import write_atomically
from remit_megatron.data.tokenizer import same_tokenizer
from remit_megatron.errors import UserError

FORMAT = 1


class SourceScores(BaseModel):
    """One source of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    fingerprint: str
    """Of the dataset."""
    samples: int = Field(ge=0)
    """Samples from number 0 on that are scored, or will be."""


class KeptDistribution(BaseModel):
    """What is kept of each token's distribution, beside the label's score."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    top_k: int = Field(ge=1)
    """Most probable tokens."""
    temperature: float
    """It divides the logits, also for the entropy."""
    vocab_size: int = Field(ge=1)
    """It decides how many bits an id takes."""


class CacheManifest(BaseModel):
    """What the scores belong to: everything that a score depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    format: int = FORMAT
    reference: str
    """Identity of the reference's weights."""
    precision: str
    """fp32, bf16 or fp8."""
    tokenizer: str | None
    """Hash of the tokenizer that the datasets were made with."""
    sequence_length: int = Field(ge=1)
    data_seed: int
    """It orders the documents that samples are cut from."""
    document_mask: bool
    eod_mask_loss: bool
    eod_id: int | None
    """Where one of the two masks is in use."""
    block_samples: int = Field(ge=1)
    distribution: KeptDistribution | None = None
    """None: the label's score alone is kept."""
    sources: tuple[SourceScores, ...]

    @model_serializer(mode="wrap")
    def _without_what_is_not_kept(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files of labels' scores say nothing of distributions, as those that were made before there were any."""
        content: dict[str, Any] = handler(self)
        if self.distribution is None:
            content.pop("distribution", None)
        return content

    def belongs_to(self, source: int) -> bytes:
        """SHA-256 of all that scores of one source depend on; not of how many there are, nor of other sources."""
        content = self.model_dump(mode="json", exclude={"sources"})
        content["fingerprint"] = self.sources[source].fingerprint
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()

    def write(self, folder: Path) -> None:
        """Write manifest.json durably, with a checksum of its own."""
        content = self.model_dump(mode="json")
        content["checksum"] = _checksum(content)
        write_atomically(folder / "manifest.json", (json.dumps(content, indent=1) + "\n").encode())

    @staticmethod
    def read(folder: Path, key: str) -> "CacheManifest":
        """Raises UserError naming the recipe key where there is none, or a damaged one."""
        path = folder / "manifest.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("checksum", None)
            manifest = CacheManifest.model_validate_json(json.dumps(content))
        except FileNotFoundError:
            raise UserError(f"{key}: {folder} holds no scores: make them with `remit score`") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UserError(f"{key}: {path} is no valid manifest ({reason}): score again") from None
        if checksum != _checksum(content) or manifest.format != FORMAT:
            raise UserError(f"{key}: {path} was damaged, edited or is of another format: score again")
        return manifest


def check_same(found: CacheManifest, wanted: CacheManifest, folder: Path, key: str, *, sources: bool = True) -> None:
    """Raises UserError naming the first thing in which the scores found differ from those wanted."""
    different = first_difference(found, wanted)
    if different:
        words, a, b = different
        raise UserError(
            f"{key}: the scores in {folder} do not fit: {words} was {a} when they were made, this recipe has {b}: run "
            "`remit score` into another folder"
        )
    if sources and [s.fingerprint for s in found.sources] != [s.fingerprint for s in wanted.sources]:
        raise UserError(
            f"{key}: {folder} holds scores of other datasets than data.train, or of the same in another order, which "
            "only a run that reads may have: keep the order, or write into another folder"
        )


def first_difference(found: CacheManifest, wanted: CacheManifest) -> tuple[str, Any, Any] | None:
    """What scores depend on besides the datasets: its name, and the value of each side, shortened."""
    names = {
        "reference": "the reference's weights",
        "precision": "the precision",
        "tokenizer": "the tokenizer",
        "sequence_length": "data.sequence_length",
        "data_seed": "data.seed",
        "document_mask": "data.document_mask",
        "eod_mask_loss": "data.eod_mask_loss",
        "eod_id": "data.eod_id",
    }
    for name, words in names.items():
        a, b = getattr(found, name), getattr(wanted, name)
        one_tokenizer = name == "tokenizer" and a and b and same_tokenizer(a, b)
        if a != b and not one_tokenizer:
            return words, _short(a), _short(b)
    return _other_distribution(found.distribution, wanted.distribution)


def _other_distribution(found: KeptDistribution | None, wanted: KeptDistribution | None) -> tuple[str, Any, Any] | None:
    if found is None or wanted is None:
        ours, theirs = (one.top_k if one is not None else 0 for one in (found, wanted))
        return ("reference.distribution", ours, theirs) if found != wanted else None
    for name, words in (
        ("top_k", "reference.distribution"),
        ("temperature", "the temperature of the distribution and its entropy (objective.temperature)"),
        ("vocab_size", "the reference's vocabulary"),
    ):
        if getattr(found, name) != getattr(wanted, name):
            return words, getattr(found, name), getattr(wanted, name)
    return None


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
