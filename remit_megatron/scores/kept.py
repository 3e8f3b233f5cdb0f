"""Scores made online are kept on disk, and read from there where a later epoch, or another run, needs them again."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.mcore.attention import zigzag_slice
from remit_megatron.mcore.datasets import SOURCE_BITS, TrainingData
from remit_megatron.mcore.groups import Groups
from remit_megatron.ops.score_steps import quantise
from remit_megatron.run.process import from_rank_0
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest

Batch = dict[str, torch.Tensor]
KEY = "reference.write_scores"


class WriteThrough:
    """A score cache that training fills. A block is written once all of its samples have been scored by this process.

    Samples of blocks that a stop left unfinished are scored again; `remit score` makes those that are still missing.
    """

    def __init__(
        self, recipe: Recipe, manifest: CacheManifest, data: TrainingData, groups: Groups, device: torch.device
    ):
        """Open the cache, or begin it. Collective. Raises UserError where the folder holds other scores."""
        assert recipe.reference is not None
        assert recipe.reference.write_scores is not None
        folder = Path(recipe.reference.write_scores)
        # The folder may know of more samples than this run needs.
        manifest = from_rank_0(lambda: ScoreCache.begin(folder, manifest, KEY).manifest, device)
        self.cache = ScoreCache(folder, manifest, KEY)
        self.recipe = recipe
        self.data = data
        self.groups = groups
        self.device = device
        self._writes = groups.counts_loss and groups.dp_cp.rank() == 0
        self._blocks = {(block.source, block.number): block for block in blocks_of(manifest)}
        self._filled: dict[tuple[int, int], dict[int, tuple[np.ndarray, np.ndarray]]] = {}

    def read(self, step: int, batches: list[Batch]) -> bool:
        """Put the scores of a step's samples into its batches where all are on disk; whether it did. Collective."""
        ids = self._samples(step)
        if not from_rank_0(lambda: all(self.cache.has(*one) for one in ids), self.device):
            return False
        mask = (1 << SOURCE_BITS) - 1
        for batch in batches:
            rows = [self.cache.scores(i >> SOURCE_BITS, i & mask) for i in batch["sample_id"].tolist()]
            batch["ref_nll"] = torch.from_numpy(np.stack(rows)).to(batch["tokens"].device)
        return True

    def write(self, step: int, batches: list[Batch]) -> None:
        """Keep the scores of a step, made online or by a scorer. Collective over the last stage's ranks."""
        if not self.groups.is_last_stage:
            return
        samples, length = self._samples(step), self.recipe.data.sequence_length
        cp, dp, size = self.groups.cp, self.groups.dp, self.recipe.batch.microbatch_samples
        positions = zigzag_slice(torch.arange(length)[None], cp.rank(), cp.size())[0].to(self.device)
        both = torch.zeros(2, len(samples), length, dtype=torch.int32, device=self.device)
        for i, batch in enumerate(batches):
            first = (i * dp.size() + dp.rank()) * size
            mask = batch["loss_mask"].to(self.device)[:, positions].int()
            scores = batch["ref_nll_local"] if "ref_nll_local" in batch else batch["ref_nll"][:, positions]
            both[:, first : first + size, positions] = torch.stack([quantise(scores), mask])
        dist.all_reduce(both, group=self.groups.dp_cp)
        if self._writes:
            steps, masks = both.cpu().numpy()
            for row, sample in enumerate(samples):
                self._keep(*sample, steps[row], masks[row])

    def _samples(self, step: int) -> list[tuple[int, int]]:
        count = self.recipe.global_batch_samples
        return [self.data.order[n] for n in range((step - 1) * count, step * count)]

    def _keep(self, source: int, number: int, steps: np.ndarray, mask: np.ndarray) -> None:
        if self.cache.has(source, number):
            return
        index, row = divmod(number, self.cache.manifest.block_samples)
        rows = self._filled.setdefault((source, index), {})
        rows[row] = steps, mask
        block = self._blocks[source, index]
        if len(rows) == block.samples:
            parts: Any = [np.stack([rows[i][which] for i in range(block.samples)]) for which in (0, 1)]
            self.cache.write_block(block, *parts)
            del self._filled[source, index]
