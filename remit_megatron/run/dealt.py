"""A held-out set's samples dealt to data-parallel ranks, and what comes of their tokens put together again."""

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.config import Recipe
from remit_megatron.mcore import datasets
from remit_megatron.mcore.attention import zigzag_slice
from remit_megatron.mcore.groups import Groups


class DealtSamples:
    """All samples of a held-out set, in microbatches of the recipe's size; the last ones are filled up, masked."""

    def __init__(self, recipe: Recipe, held_out: datasets.HeldOut, groups: Groups, device: torch.device):
        self.held_out = held_out
        self.groups = groups
        self.device = device
        self.length = recipe.data.sequence_length
        self.samples = recipe.batch.microbatch_samples
        stages, interleaved = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline > 1
        self.round = stages if interleaved else 1
        """The interleaved schedule takes whole rounds of so many microbatches."""
        count = -(-held_out.length // (self.samples * groups.dp.size()))
        self.count = -(-count // self.round) * self.round
        """Microbatches of a rank."""

    def microbatches(self, first: int, last: int) -> list[dict[str, Tensor]]:
        """This rank's microbatches `first` to `last` - 1."""
        dp = self.groups.dp
        start = first * dp.size() * self.samples
        return datasets.microbatches(self.held_out, start, last - first, self.samples, dp.rank(), dp.size())

    def whole(self, parts: list[Tensor]) -> Tensor:
        """Parts [b, s/cp] of every microbatch, on last-stage ranks, -> [n, s] float32 on the CPU of every rank.

        Collective.
        """
        groups, size = self.groups, self.samples
        whole = torch.zeros(self.count * groups.dp.size() * size, self.length, device=self.device)
        if groups.counts_loss:
            positions = zigzag_slice(torch.arange(self.length)[None], groups.cp.rank(), groups.cp.size())[0]
            for i, part in enumerate(parts):
                first = (i * groups.dp.size() + groups.dp.rank()) * size
                whole[first : first + size, positions.to(self.device)] = part
        dist.all_reduce(whole)  # each number with zeros: exact
        return whole[: self.held_out.length].cpu()
