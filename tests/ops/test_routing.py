"""Which tokens are routed, and with which weight, against a plain loop; the same ones in every cut of the batch."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.ops.choices import Routing
from remit_megatron.ops.routing import PROBED_ONE_IN, Routed, route
from tests.ranks import run_ranks

SAMPLES, LENGTH, STEP = 8, 12, 3
SAMPLE_IDS = torch.arange(SAMPLES) * 7 + 1


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, agreement and mask [SAMPLES, LENGTH]: unequal masks, a sample without tokens, masked entries that are
    not finite."""
    generator = torch.Generator().manual_seed(4)
    entropy = torch.rand(SAMPLES, LENGTH, generator=generator) * 4
    agrees = (torch.rand(SAMPLES, LENGTH, generator=generator) < 0.4).float()
    density = torch.linspace(0.1, 1.0, SAMPLES)[:, None]
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) < density).float()
    mask[2] = 0
    return entropy.where(mask > 0, torch.nan), agrees.where(mask > 0, torch.inf), mask


def routed_in(sizes: list[int], **settings: Any) -> dict[str, Tensor]:
    """Whole fields [SAMPLES, LENGTH], of a batch cut into microbatches of these sizes."""
    parts = [one.split(sizes) for one in (*batch(), SAMPLE_IDS)]
    found = route(Routing(**settings), *parts[:3], sample_ids=parts[3], positions=torch.arange(LENGTH), step=STEP)  # type: ignore[misc]
    return {name: torch.cat([getattr(one, name) for one in found]) for name in Routed.__dataclass_fields__}


@pytest.mark.parametrize("share", ["0.2", "0.85", "1"])
@pytest.mark.parametrize("by", ["low_entropy", "high_entropy"])
@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_the_share_with_the_lowest_or_highest_entropy(by: Any, share: str, scope: Any) -> None:
    entropy, _, mask = batch()
    found = routed_in([2] * 4, share=float(share), by=by, scope=scope)
    sign = 1 if by == "low_entropy" else -1
    tokens = [(sign * entropy[b, t].item(), b, t) for b, t in mask.nonzero().tolist()]
    groups = [tokens] if scope == "global" else [[x for x in tokens if x[1] == b] for b in range(SAMPLES)]
    chosen = torch.zeros(SAMPLES, LENGTH)
    for group in groups:
        best = sorted(group)[: math.ceil(Fraction(share) * len(group))]
        for _, b, t in best:
            chosen[b, t] = 1
        for _, b, t in group:
            assert found["threshold"][b, t].item() == pytest.approx(sign * best[-1][0], abs=1e-6)
    assert torch.equal(found["chosen"], chosen)
    count, routed = mask.sum(), chosen.sum()
    own = torch.where(chosen > 0, routed, count - routed)
    torch.testing.assert_close(found["balance"], (count / own).where(mask > 0, 0.0))
    # Both groups then have the same weight: each counts as many tokens as there are.
    for one in (1, 0) if share != "1" else (1,):
        assert found["balance"][(mask > 0) & (chosen == one)].sum().item() == pytest.approx(count.item())


@pytest.mark.parametrize("by", ["low_entropy", "high_entropy", "random", "correct"])
def test_any_cut_into_microbatches_routes_the_same_tokens(by: Any) -> None:
    whole = routed_in([8], share=0.3, by=by)
    for sizes in ([1] * 8, [2] * 4, [3, 5]):
        cut = routed_in(sizes, share=0.3, by=by)
        assert all(torch.equal(cut[name], whole[name]) or whole[name].isnan().all() for name in whole)


def test_where_the_reference_is_right() -> None:
    _, agrees, mask = batch()
    found = routed_in([8], share=0.3, by="correct", scope="sequence")
    assert torch.equal(found["chosen"], agrees.where(mask > 0, 0.0))
    assert found["threshold"].isnan().all()


def test_a_random_choice_has_the_size_and_follows_the_seed() -> None:
    mask = batch()[2]
    one, other = (routed_in([8], share=0.3, by="random", seed=seed)["chosen"] for seed in (1, 2))
    assert one.sum() == other.sum() == math.ceil(0.3 * mask.sum())
    assert not torch.equal(one, other)
    assert not (one * (1 - mask)).any()


def test_no_share_routes_nothing() -> None:
    mask = batch()[2]
    found = routed_in([2] * 4, share=0.0)
    assert not found["chosen"].any()
    assert torch.equal(found["balance"], mask)
    assert not found["threshold"].isfinite().any()


def test_of_other_tokens_a_few_are_compared() -> None:
    ids, shape = torch.arange(64), (64, 128)
    (found,) = route(
        Routing(share=0.2),
        [torch.rand(shape)],
        [torch.zeros(shape)],
        [torch.ones(shape)],
        sample_ids=[ids],
        positions=torch.arange(128),
        step=1,
    )
    others = found.compared[found.chosen == 0].float().mean().item()
    assert found.compared[found.chosen == 1].all()
    # 6,554 draws of one in sixteen: a standard deviation of 0.003.
    assert others == pytest.approx(1 / PROBED_ONE_IN, abs=0.012)


def test_an_entropy_that_is_not_finite_reaches_the_loss() -> None:
    entropy, agrees, mask = batch()
    entropy[0, int(mask[0].argmax())] = torch.nan
    (found,) = route(
        Routing(share=0.2),
        [entropy],
        [agrees],
        [mask],
        sample_ids=[SAMPLE_IDS],
        positions=torch.arange(LENGTH),
        step=1,
    )
    assert found.chosen[mask > 0].isnan().all()


def on_rank(rank: int, by: str) -> dict[str, Tensor]:
    """Samples 0, 2, ... on rank 0 in microbatches of 1, the others on rank 1 in one of 2 and two of 1."""
    import torch.distributed as dist

    sizes = [[1, 1, 1, 1], [2, 1, 1]][rank]
    parts = [one[rank::2].split(sizes) for one in (*batch(), SAMPLE_IDS)]
    found = route(
        Routing(share=0.3, by=by),  # type: ignore[arg-type]
        *parts[:3],
        sample_ids=parts[3],
        positions=torch.arange(LENGTH),
        step=STEP,
        group=dist.group.WORLD,
    )
    return {name: torch.cat([getattr(one, name) for one in found]) for name in Routed.__dataclass_fields__}


def test_ranks_route_what_one_rank_routes() -> None:
    for by in ("low_entropy", "random"):
        whole = routed_in([8], share=0.3, by=by)
        for rank, found in enumerate(run_ranks(2, on_rank, by)):
            for name in ("chosen", "balance", "compared"):
                assert torch.equal(found[name], whole[name][rank::2]), name
