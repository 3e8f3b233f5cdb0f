"""Manifests of small score folders."""

from typing import Any

from remit_megatron.scores.manifest import CacheManifest, SourceScores


def score_manifest(*samples: int, **changes: Any) -> CacheManifest:
    """Of sources with so many samples of 4 tokens, named d, e, ..., in blocks of 3."""
    given: dict[str, Any] = {
        "reference": "r",
        "precision": "fp32",
        "tokenizer": "a",
        "sequence_length": 4,
        "data_seed": 1,
        "document_mask": False,
        "eod_mask_loss": False,
        "eod_id": None,
        "block_samples": 3,
    }
    sources = tuple(SourceScores(fingerprint=chr(ord("d") + i), samples=count) for i, count in enumerate(samples))
    return CacheManifest(**{**given, "sources": sources, **changes})
