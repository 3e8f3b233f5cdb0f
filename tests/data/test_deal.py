"""The dealing of samples and positions against loops that count them one by one."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.data.deal import Deal

SIZES = list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3)))
"""(data-parallel ranks, context-parallel ranks, samples of a microbatch)."""
LENGTH = 16


def deals(dp: int, cp: int, samples: int) -> list[Deal]:
    """Of every rank that holds a part of the batch of its own."""
    return [
        Deal(dp_rank=d, dp_size=dp, cp_rank=c, cp_size=cp, microbatch_samples=samples)
        for d in range(dp)
        for c in range(cp)
    ]


def turns(dp: int, samples: int, rounds: int) -> list[list[list[int]]]:
    """Sample numbers by data-parallel rank and microbatch, handed out one by one."""
    hands: list[list[list[int]]] = [[] for _ in range(dp)]
    number = 0
    for _ in range(rounds):
        for hand in hands:
            hand.append([number + i for i in range(samples)])
            number += samples
    return hands


@pytest.mark.parametrize(("dp", "cp", "samples"), SIZES)
def test_every_sample_is_dealt_once(dp: int, cp: int, samples: int) -> None:
    for deal in deals(dp, cp, samples):
        rows = [list(one) for one in deal.microbatches(4)]
        assert rows == turns(dp, samples, 4)[deal.dp_rank]
        assert deal.turn_samples == dp * samples


@pytest.mark.parametrize(("dp", "cp", "samples"), SIZES)
@pytest.mark.parametrize("round_of", [1, 2, 3])
def test_rounds_are_filled_up(dp: int, cp: int, samples: int, round_of: int) -> None:
    """The fewest microbatches that hold all samples, in whole rounds."""
    deal = deals(dp, cp, samples)[0]
    for count in range(40):
        needed = 0
        while needed * dp * samples < count or needed % round_of:
            needed += 1
        assert deal.num_microbatches(count, round_of) == needed


def test_positions_are_chunk_r_and_the_mirrored_one() -> None:
    """Of 16 positions over 2 ranks, in four chunks: written out."""
    first, second = (Deal(cp_rank=r, cp_size=2).positions(16).tolist() for r in (0, 1))
    assert first == [0, 1, 2, 3, 12, 13, 14, 15]
    assert second == [4, 5, 6, 7, 8, 9, 10, 11]
    assert Deal().positions(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_cut_takes_the_positions_it_names(cp: int) -> None:
    whole = torch.arange(3 * LENGTH).view(3, LENGTH)
    seen: list[int] = []
    for rank in range(cp):
        deal = Deal(cp_rank=rank, cp_size=cp)
        places = deal.positions(LENGTH).tolist()
        assert deal.cut(whole).tolist() == [[row * LENGTH + place for place in places] for row in range(3)]
        seen += places
    assert sorted(seen) == list(range(LENGTH))


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="18 positions do not divide"):
        Deal(cp_size=2).cut(torch.zeros(1, 18))


class Ranks:
    """Adds up what all ranks have, when the last of them has come."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        self.found.append(x)

    def total(self) -> Tensor:
        return torch.stack(self.found).sum(dim=0)


@pytest.mark.parametrize(("dp", "cp", "samples"), SIZES)
@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_collect_restores_what_was_dealt(dp: int, cp: int, samples: int, count: int, leading: Any) -> None:
    """Parts of every rank, the rows that fill up among them, give the whole samples back bit for bit."""
    generator = torch.Generator().manual_seed(count)
    whole = torch.randn(*leading, count, LENGTH, generator=generator)
    whole[..., 0, 3] = torch.nan
    reduce = Ranks()
    for deal in deals(dp, cp, samples):
        parts = []
        for rows in deal.microbatches(deal.num_microbatches(count)):
            filled = whole[..., [min(row, count - 1) for row in rows], :]
            parts.append(filled[..., deal.positions(LENGTH)])
        deal.collect(parts, torch.zeros(*leading, count, LENGTH), reduce)
    assert torch.equal(reduce.total().nan_to_num(nan=7.0), whole.nan_to_num(nan=7.0))


def test_a_rank_without_parts_adds_nothing() -> None:
    reduce = Ranks()
    into = Deal().collect([], torch.zeros(2, 4), reduce)
    assert reduce.found[0] is into
    assert not into.any()
