"""Scores of another source are kept on disk, and read from there where a later epoch, or another run, needs them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.data.microbatch import Microbatch
from remit_megatron.ops.score_quanta import quantise
from remit_megatron.run.prepare import Ready
from remit_megatron.run.process import from_rank_0
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.cached import Cached
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.record import num_planes, to_planes
from remit_megatron.scores.source import Filled, ScoreSource

KEY = "reference.write_scores"


class Kept:
    """A score cache that training fills. A block is written once all of its samples have been scored by this process.

    Samples of blocks that a stop left unfinished are scored again; `remit score` makes those that are still missing.
    """

    def __init__(self, inner: ScoreSource, ready: Ready, manifest: CacheManifest):
        """Open the cache, or begin it. Collective. Raises UserError where the folder holds other scores."""
        assert ready.recipe.reference is not None
        assert ready.recipe.reference.write_scores is not None
        folder, self._device = Path(ready.recipe.reference.write_scores), ready.process.device
        # The folder may know of more samples than this run needs.
        manifest = from_rank_0(lambda: ScoreCache.begin(folder, manifest, KEY).manifest, self._device)
        self.cache = ScoreCache(folder, manifest, KEY)
        self._inner = inner
        kept = manifest.distribution
        self._disk = Cached(self.cache, ready.groups, self._device, distribution=kept is not None)
        self._planes = num_planes(kept)
        self._recipe = ready.recipe
        self._order = ready.data.order
        self._groups = ready.groups
        self._deal = ready.deal
        self._writes = ready.groups.counts_loss and ready.groups.dp_cp.rank() == 0
        self._blocks = {(block.source, block.number): block for block in blocks_of(manifest)}
        self._unfinished: dict[tuple[int, int], dict[int, np.ndarray]] = {}
        """Blocks by source and number: quanta, mask and planes [2 + P, s] of the rows that they have so far."""

    def want(self, step: int, *, done: bool = False) -> None:
        self._inner.want(step, done=done)

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        """From disk where all samples of the step are there; else from the other source, and to disk."""
        count = self._recipe.global_batch_samples
        samples = [self._order[n] for n in range((step - 1) * count, step * count)]
        if from_rank_0(lambda: all(self.cache.has(*one) for one in samples), self._device):
            self._inner.want(step + 1)
            return self._disk.fill(step, microbatches)
        filled = self._inner.fill(step, microbatches)
        if self._groups.is_last_stage:
            self._keep(samples, filled.microbatches)
        return filled

    def _keep(self, samples: list[tuple[int, int]], microbatches: Sequence[Microbatch]) -> None:
        """Collective over the last stage's ranks, one of which writes."""
        parts = []
        for microbatch in microbatches:
            assert microbatch.scores is not None
            assert microbatch.scores.ref_nll is not None
            mask = self._deal.cut(microbatch.loss_mask.to(self._device)).int()
            part = torch.stack([quantise(microbatch.scores.ref_nll), mask])
            parts.append(torch.cat([part, to_planes(microbatch.scores)]) if self._planes else part)
        length = self._recipe.data.sequence_length
        whole = torch.zeros(2 + self._planes, len(samples), length, dtype=torch.int32, device=self._device)
        self._deal.collect(parts, whole, lambda x: dist.all_reduce(x, group=self._groups.dp_cp))
        if self._writes:
            found = whole.cpu().numpy()
            for row, sample in enumerate(samples):
                self._keep_sample(*sample, found[:, row])

    def _keep_sample(self, source: int, number: int, kept: np.ndarray) -> None:
        if self.cache.has(source, number):
            return
        index, row = divmod(number, self.cache.manifest.block_samples)
        rows = self._unfinished.setdefault((source, index), {})
        rows[row] = kept
        block = self._blocks[source, index]
        if len(rows) == block.samples:
            whole = np.stack([rows[i] for i in range(block.samples)], axis=1)
            self.cache.write_block(block, whole[0], whole[1], whole[2:] if self._planes else None)
            del self._unfinished[source, index]

    def close(self) -> None:
        self._inner.close()
