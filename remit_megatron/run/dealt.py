"""A held-out set's samples dealt to data-parallel ranks, and what comes of their tokens put together again."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.config import Recipe
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.mcore import datasets
from remit_megatron.mcore.groups import Groups


class DealtSamples:
    """All samples of a held-out set, in microbatches of the recipe's size; the last ones are filled up, masked."""

    def __init__(self, recipe: Recipe, held_out: datasets.HeldOut, groups: Groups, device: torch.device):
        self.held_out = held_out
        self.groups = groups
        self.deal = groups.deal(recipe.batch.microbatch_samples)
        self.device = device
        self.length = recipe.data.sequence_length
        stages, interleaved = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline > 1
        self.round = stages if interleaved else 1
        """The interleaved schedule takes whole rounds of so many microbatches."""
        self.count = self.deal.num_microbatches(held_out.length, round_of=self.round)
        """Microbatches of a rank."""

    def microbatches(self, first: int, last: int) -> list[Microbatch]:
        """This rank's microbatches `first` to `last` - 1."""
        return datasets.microbatches(self.held_out, first * self.deal.turn_samples, last - first, self.deal)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts [b, s/cp] of every microbatch, on last-stage ranks, -> [n, s] float32 on the CPU of every rank.

        Collective.
        """
        whole = torch.zeros(self.held_out.length, self.length, device=self.device)
        return self.deal.collect(parts if self.groups.counts_loss else (), whole, dist.all_reduce).cpu()
