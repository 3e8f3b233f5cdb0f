"""Scores that were made ahead: each sample's are read from a folder by the sample's identity."""

from collections.abc import Sequence

import numpy as np
import torch

from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.mcore.datasets import SOURCE_BITS
from remit_megatron.mcore.groups import Groups
from remit_megatron.scores.cache import ScoreCache
from remit_megatron.scores.record import from_planes, unpack_planes
from remit_megatron.scores.source import Filled


class Cached:
    """Reads a cache that holds all samples it is asked for. Nothing is read on ranks that compute no loss."""

    def __init__(self, cache: ScoreCache, groups: Groups, device: torch.device, *, distribution: bool = False):
        """distribution: whether what is kept of it is read too."""
        self.cache = cache
        self._reads = groups.is_last_stage
        self._deal = groups.deal()
        self._device = device
        self._distribution = distribution

    def want(self, step: int, *, done: bool = False) -> None:
        """Everything is there."""

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        """Raises RunError for a block that was damaged since the start."""
        filled = [self._filled(one) for one in microbatches] if self._reads else list(microbatches)
        return Filled(microbatches=filled, ran_reference=False)

    def _filled(self, microbatch: Microbatch) -> Microbatch:
        assert microbatch.sample_id is not None, "scores on disk are found by the samples' identity"
        places = [divmod(identity, 1 << SOURCE_BITS) for identity in microbatch.sample_id.tolist()]
        whole = torch.from_numpy(np.stack([self.cache.scores(*place) for place in places]))
        ref_nll = self._deal.cut(whole).to(self._device)
        if not self._distribution:
            return microbatch.with_scores(Scores(ref_nll=ref_nll))
        planes = unpack_planes(np.stack([self.cache.row(*place) for place in places]))
        mine = torch.stack([self._deal.cut(plane) for plane in planes]).to(self._device)
        return microbatch.with_scores(from_planes(mine, self._deal.cut(microbatch.labels), ref_nll))

    def close(self) -> None:
        """Nothing is held."""
