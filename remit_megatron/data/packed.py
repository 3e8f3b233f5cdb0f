"""Packed samples straight from a dataset and its sample index, bit for bit what Megatron's GPTDataset gives.

GPTDataset spends most of its time on bookkeeping for each document of a sample; here a sample is one gather of slices.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.errors import RunError


@dataclass(frozen=True, slots=True)
class PackedSamples:
    """Samples of s + 1 tokens that overlap by one, in the shuffled order of a sample index.

    document_index [documents] int32: the order of documents. sample_index [samples + 1, 2] int32 or int64: position in
    document_index and token offset where each sample begins. shuffle_index [samples]: the order of samples.
    """

    indexed: IndexedTokens
    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def text(self, index: int) -> np.ndarray:
        """Token ids of one sample, [s + 1] int64."""
        tokens = self.indexed.tokens
        parts = [tokens[low:high] for low, high in self._slices(index)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)

    def places(self, index: int) -> np.ndarray:
        """Where in .bin the tokens of one sample are, [s + 1] int64, counted in tokens."""
        return np.concatenate([np.arange(low, high) for low, high in self._slices(index)])

    def _slices(self, index: int) -> list[tuple[int, int]]:
        number = int(self.shuffle_index[index])
        (first, offset), (last, end) = self.sample_index[number].tolist(), self.sample_index[number + 1].tolist()
        documents = self.document_index[first : last + 1]
        starts = self.indexed.pointers[documents] // self.indexed.dtype.itemsize
        stops = starts + self.indexed.lengths[documents]
        stops[-1] = starts[-1] + end + 1  # the token after the sample is its last label
        starts[0] += offset
        return list(zip(starts.tolist(), stops.tolist(), strict=True))


def open_packed(indexed: IndexedTokens, folder: Path) -> PackedSamples:
    """Open a folder with one GPTDataset's cached indices. Raises RunError where it does not hold exactly one."""
    arrays = []
    for name in ("document_index", "sample_index", "shuffle_index"):
        files = sorted(folder.glob(f"*-{name}.npy"))
        if len(files) != 1:
            found = f"{len(files)} files *-{name}.npy, one is expected"
            raise RunError(f"{folder}: {found}; delete the folder to build it again")
        arrays.append(np.load(files[0], mmap_mode="r", allow_pickle=False).view(np.ndarray))
    return PackedSamples(indexed, *arrays)
