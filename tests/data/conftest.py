"""A dataset with a manifest, and one without."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.writer import write_dataset
from remit_megatron.data.manifest import manifest_path

VOCAB = 1000


def random_documents(seed: int, count: int = 400, vocab: int = VOCAB) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, vocab, size) for size in generator.integers(1, 90, count)]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """PREFIX of about 18,000 tokens, EOD 0, tokenizer hash "aa"."""
    prefix = str(tmp_path / "set" / "data")
    write_dataset(prefix, random_documents(0), vocab_size=VOCAB, eod_id=0, tokenizer_hash="aa")
    return prefix


@pytest.fixture
def foreign(dataset: str) -> str:
    """The same without a manifest, as Megatron's own tool leaves it."""
    manifest_path(dataset).unlink()
    return dataset
