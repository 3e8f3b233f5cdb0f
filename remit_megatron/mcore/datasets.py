"""Training samples over .bin/.idx: Megatron's GPTDataset cuts each source, a stateless order of ours is over them.

Each source is one epoch of Megatron's GPTDataset: documents shuffled by `data.seed`, concatenated, cut into samples of
s + 1 tokens that overlap by one. A sample is therefore the same in every epoch and every run over the same data, and
has an identity that score caches can use. Sample n of a run follows from n alone, so resuming needs one integer.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from remit_megatron.config import Data
from remit_megatron.data.deal import Deal
from remit_megatron.data.index_cache import INDEX_FOLDER, ensure_cache
from remit_megatron.data.indexed import open_index
from remit_megatron.data.manifest import DatasetInfo, end_of_document, quick_verify
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.data.packed import PackedSamples, open_packed
from remit_megatron.data.samples import assemble
from remit_megatron.data.steps import stack
from remit_megatron.errors import RemitError, RunError, UserError
from remit_megatron.mcore import compat

SOURCE_BITS = 40
"""A sample's id is source << 40 | number of the sample in its source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSamples:
    """One epoch of one source."""

    info: DatasetInfo
    packed: PackedSamples

    def __len__(self) -> int:
        return len(self.packed)

    def text(self, index: int) -> np.ndarray:
        """Token ids [s + 1] int64 of one sample."""
        return self.packed.text(index)


def open_source(prefix: str, data: Data, vocab_size: int, tokenizer_hash: str | None = None) -> SourceSamples:
    """Verify and open one source. Its sample index is built where it is missing or damaged.

    Collective where torch.distributed is initialised: rank 0 verifies and builds, the others take its word and open.
    Raises UserError naming the file, on every rank alike, or on the one rank that cannot read it.
    """
    found: list[Any] = [None]
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_rank() == 0:
        try:
            info = quick_verify(prefix, vocab_size=vocab_size, tokenizer_hash=tokenizer_hash)
            found = [(info, _ensure_index(prefix, data, info))]
        except RemitError as error:
            found = [error]
    if distributed:
        dist.broadcast_object_list(found, device=torch.device("cpu") if dist.get_backend() == "gloo" else None)
    if isinstance(found[0], RemitError):
        raise found[0]
    info, index = found[0]
    return SourceSamples(info=info, packed=open_packed(open_index(prefix, is_checked=True), index))


def _ensure_index(prefix: str, data: Data, info: DatasetInfo) -> Path:
    """The folder of a whole sample index. Its key is content, not path: data made anew gets an index of its own."""
    if info.num_tokens <= data.sequence_length:
        raise UserError(
            f"{prefix}: {info.num_tokens} tokens are fewer than one sample of data.sequence_length + 1 = "
            f"{data.sequence_length + 1}"
        )
    root = Path(data.cache_dir) if data.cache_dir else Path(prefix).parent / INDEX_FOLDER
    key = {
        "dataset": info.fingerprint,
        "sequence_length": data.sequence_length,
        "seed": data.seed,
        "megatron-core": compat.version("megatron-core"),
    }
    try:
        return ensure_cache(root, key, lambda folder: _build_index(prefix, data, info, folder))
    except RunError as error:
        raise UserError(f"{error}; the sample index of {prefix} goes there: set data.cache_dir") from None


def _build_index(prefix: str, data: Data, info: DatasetInfo, index: Path) -> None:
    """Have Megatron's dataset write the indices of one epoch to the empty folder `index`."""
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.sequence_length,
        path_to_cache=str(index),
        split="1",
        tokenizer=SimpleNamespace(eod=None, vocab_size=None, unique_identifiers={"content": info.fingerprint}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    level = logging.getLogger("megatron.core.datasets").level
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    try:
        indexed = IndexedDataset(prefix)
        documents = np.arange(len(indexed), dtype=np.int32)
        # Megatron hashes the name it is given into the index's file names: the content serves any path.
        GPTDataset(indexed, info.fingerprint, documents, None, Split.train, config)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{prefix}: no sample index can be built in {index}: {error}") from error
    finally:
        logging.getLogger("megatron.core.datasets").setLevel(level)


class SampleOrder:
    """Which sample of which source is the n-th of a run. Stateless: a function of n."""

    def __init__(self, lengths: list[int], weights: list[float], total: int, seed: int):
        """lengths: samples of each source in one epoch; total: samples of the run."""
        self.lengths = lengths
        self.total = total
        self.seed = seed
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        """The newest epoch's order of each source."""
        self._source: np.ndarray | None = None
        if len(lengths) > 1:
            self._source = np.zeros(total, dtype=np.int16)
            self._number = np.zeros(total, dtype=np.int64)
            share = np.array(weights, dtype=np.float64) / sum(weights)
            helpers.build_blending_indices(self._source, self._number, share, len(lengths), total, False)

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(source, number of the sample in the source)."""
        source, k = (0, n) if self._source is None else (int(self._source[n]), int(self._number[n]))
        epoch, k = divmod(k, self.lengths[source])
        if epoch:  # the first epoch keeps the order of GPTDataset, which is shuffled already
            known = self._permutations.get(source)  # threads may replace it meanwhile, and never change it
            if known is None or known[0] != epoch:
                generator = np.random.Generator(np.random.PCG64([self.seed, source, epoch]))
                known = self._permutations[source] = epoch, generator.permutation(self.lengths[source])
            k = int(known[1][k])
        return source, k

    def needed(self) -> list[int]:
        """For each source, how many of its samples, from number 0 on, the run needs: all after its first epoch."""
        drawn = np.bincount(self._source, minlength=len(self.lengths)) if self._source is not None else [self.total]
        return [min(int(count), length) for count, length in zip(drawn, self.lengths, strict=True)]


class TrainingData:
    """Samples by number, blended over sources. See `remit_megatron.data.samples.assemble` for what a sample holds."""

    def __init__(self, sources: list[SourceSamples], data: Data, total: int):
        self.sources = sources
        self.data = data
        self.order = SampleOrder([len(s) for s in sources], [s.weight for s in data.train], total, data.seed)
        self.eod_id = end_of_document([source.info for source in sources], data.eod_id)

    def sample(self, n: int) -> dict[str, np.ndarray]:
        return self.sample_of(*self.order[n])

    def sample_of(self, source: int, k: int) -> dict[str, np.ndarray]:
        """The sample of that number in a source."""
        return assemble(self.sources[source].text(k), self.data, self.eod_id, sample_id=source << SOURCE_BITS | k)


class HeldOut:
    """The first samples of one held-out set, padded with fully masked samples to a multiple of the batch."""

    def __init__(self, source: SourceSamples, data: Data, limit: int):
        self.source = source
        self.data = data
        self.length = min(limit, len(source))
        self.eod_id = end_of_document([source.info], data.eod_id)

    def sample(self, n: int) -> dict[str, np.ndarray]:
        sample = assemble(self.source.text(n if n < self.length else 0), self.data, self.eod_id, sample_id=n)
        if n >= self.length:
            sample["loss_mask"] = np.zeros_like(sample["loss_mask"])
        return sample


def microbatches(source: TrainingData | HeldOut, first: int, count: int, deal: Deal) -> list[Microbatch]:
    """This rank's first `count` microbatches of the batch that begins with sample `first`."""
    return [stack([source.sample(first + row) for row in rows]) for rows in deal.microbatches(count)]
