"""The dealing of a batch to ranks: which samples a rank has, which positions of them, and the way back.

Samples are dealt to data-parallel ranks in turns of one microbatch each; a sample's positions are dealt to
context-parallel ranks in a zigzag. Tensor- and pipeline-parallel ranks of one place have the same of both.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from remit_megatron.ops.context_parallel import zigzag_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """One rank's place among those that share a batch. Everything here is arithmetic: no group is asked."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    microbatch_samples: int = 1
    """Samples of a microbatch on one data-parallel rank."""

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size, f"data-parallel rank {self.dp_rank} of {self.dp_size}"
        assert 0 <= self.cp_rank < self.cp_size, f"context-parallel rank {self.cp_rank} of {self.cp_size}"
        assert self.microbatch_samples > 0, f"microbatches of {self.microbatch_samples} samples"

    @property
    def turn_samples(self) -> int:
        """Samples that one microbatch of every data-parallel rank holds together."""
        return self.dp_size * self.microbatch_samples

    def num_microbatches(self, samples: int, round_of: int = 1) -> int:
        """Microbatches of a rank that hold at least so many samples of all ranks, a multiple of `round_of`.

        round_of: an interleaved pipeline schedule takes whole rounds of microbatches only.
        """
        return -(-samples // (self.turn_samples * round_of)) * round_of

    def rows(self, microbatch: int) -> range:
        """This rank's samples of its microbatch, counted from the batch's first."""
        first = (microbatch * self.dp_size + self.dp_rank) * self.microbatch_samples
        return range(first, first + self.microbatch_samples)

    def microbatches(self, count: int) -> list[range]:
        """`rows` of the first `count` microbatches. Where the batch ends sooner, rows past its end only fill up."""
        return [self.rows(i) for i in range(count)]

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """[s/cp] int64: the places, in a whole sample of s = `length` positions, of this rank's positions."""
        return self.cut(torch.arange(length, device=device)[None])[0]

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's positions [b, s/cp] of whole samples [b, s]. s divides by 2 cp_size where cp_size is above 1."""
        assert self.cp_size == 1 or whole.size(1) % (2 * self.cp_size) == 0, (
            f"{whole.size(1)} positions do not divide into two chunks for each of {self.cp_size} context-parallel ranks"
        )
        return zigzag_slice(whole, self.cp_rank, self.cp_size)

    def collect(self, parts: Iterable[Tensor], into: Tensor, reduce: Callable[[Tensor], object]) -> Tensor:
        """Put microbatches' parts of all ranks together into whole samples.

        Args:
            parts: [..., b, s/cp] of each of this rank's microbatches, in order; none on a rank that has nothing to add.
                On tensor-parallel ranks of one place, either one adds or `reduce` leaves the others out.
            into: [..., n, s] zeros, overwritten. Rows of a microbatch from n on only fill up and are dropped.
            reduce: adds `into` up over ranks, in place; each number is added to zeros, which changes no bit of it.

        Returns `into`, the same on all ranks that `reduce` joins.
        """
        samples, length = into.shape[-2:]
        positions = self.positions(length, into.device)
        for microbatch, part in enumerate(parts):
            first = self.rows(microbatch).start
            held = max(0, min(self.microbatch_samples, samples - first))
            into[..., first : first + held, positions] = part[..., :held, :]
        reduce(into)
        return into
