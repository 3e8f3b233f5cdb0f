"""Selection and shuffling against plain definitions, with ties, ragged masks and any cut over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops import spec
from remit_megatron.ops.selection import shuffle_in_samples, top_share, top_share_of_all
from tests.ranks import run_ranks


def make_scores(seed: int = 0, rows: int = 4, columns: int = 24) -> tuple[Tensor, Tensor]:
    """Scores with many ties and both signs, and a ragged mask with an empty row; masked scores are not finite."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-4, 5, (rows, columns), generator=generator) / 2.0
    mask = (torch.rand(rows, columns, generator=generator) < 0.7).float()
    mask[1] = 0
    score[0, 3] = -0.0
    return score.where(mask > 0, torch.nan), mask


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("share", ["0.8", "0.6", "0.07", "1", "0.000001"])
def test_matches_specification(scope: str, share: str) -> None:
    score, mask = make_scores()
    want = spec.top_share(score, mask, share, scope)  # type: ignore[arg-type]
    got = top_share(score, mask, float(share), scope=scope)  # type: ignore[arg-type]
    assert torch.equal(got.double(), want)
    whole = torch.arange(24)
    mixed = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    again = top_share(score[:, mixed], mask[:, mixed], float(share), scope=scope, positions=whole[mixed])  # type: ignore[arg-type]
    assert torch.equal(again, got[:, mixed]), "the order in which tokens are held must not matter"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_not_finite_poisons_its_group_only(bad: float) -> None:
    score, mask = make_scores()
    score[2, 5], mask[2, 5] = bad, 1
    rows = top_share(score, mask, 0.8)
    assert rows[2].isnan().equal(mask[2] > 0)
    assert not rows[[0, 1, 3]].isnan().any()
    assert top_share(score, mask, 0.8, scope="microbatch").isnan().equal(mask > 0)
    (everywhere,) = top_share_of_all(
        [score], [mask], 0.8, sample_ids=[torch.arange(4)], positions=torch.arange(24), group=None
    )
    assert everywhere.isnan().equal(mask > 0)


@pytest.mark.parametrize("share", ["0.8", "0.6", "0.07", "1", "0.000001"])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_over_everything(share: str, ties: bool) -> None:
    score, mask = make_scores(rows=6)
    if not ties:
        score = score + torch.rand(score.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    settings = {"positions": torch.arange(24), "group": None}
    ids = torch.tensor([7, 3 << 40, 1, 2, 11, 0])
    (whole,) = top_share_of_all([score], [mask], float(share), sample_ids=[ids], **settings)  # type: ignore[arg-type]
    want = spec.top_share(score, mask, share, "microbatch")
    assert whole.sum() == want.sum()
    if ties:  # other tokens of equal score may win, so the sorted scores are what must agree
        chosen, wanted = (score[x > 0].sort().values for x in (whole, want))
        assert torch.equal(chosen, wanted)
    else:
        assert torch.equal(whole.double(), want)
    parts = top_share_of_all(
        list(score.flip(0).split([1, 3, 2])),
        list(mask.flip(0).split([1, 3, 2])),
        float(share),
        sample_ids=list(ids.flip(0).split([1, 3, 2])),
        **settings,  # type: ignore[arg-type]
    )
    assert torch.equal(torch.cat(parts), whole.flip(0)), "the cut into microbatches must not matter"


def test_no_unmasked_token() -> None:
    nothing = torch.zeros(2, 5)
    assert not top_share(nothing, nothing, 0.8).any()
    ids, place = torch.arange(2), torch.arange(5)
    (one,) = top_share_of_all([nothing], [nothing], 0.8, sample_ids=[ids], positions=place, group=None)
    assert not one.any()
    assert not shuffle_in_samples(nothing + 1, nothing, seed=1, step=1, sample_id=ids).any()


def test_shuffle_permutes_within_samples() -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(64, 24, generator=generator)
    mask = (torch.rand(64, 24, generator=generator) < 0.7).float()
    ids = torch.arange(64)

    def shuffled(seed: int = 1, step: int = 1, sample_id: Tensor = ids) -> Tensor:
        return shuffle_in_samples(values, mask, seed=seed, step=step, sample_id=sample_id)

    once = shuffled()
    assert torch.equal(once.sort(dim=1).values, (values * mask).sort(dim=1).values)
    assert ((once > 0) == (mask > 0)).all()
    assert torch.equal(shuffled(), once)
    swapped = shuffle_in_samples(values.flip(0), mask.flip(0), seed=1, step=1, sample_id=ids.flip(0))
    assert torch.equal(swapped.flip(0), once), "a sample's permutation must not depend on the samples beside it"
    for other in (shuffled(seed=2), shuffled(step=2), shuffled(sample_id=ids + 64)):
        assert (other != once).any(dim=1).all(), "every row must be permuted anew"
    # Uniform: where a value lands is independent of where it was, so a token stays in place about once a row.
    stays = ((once == values) & (mask > 0)).sum(dim=1).double().mean().item()
    assert 0.5 < stays < 1.6


def on_ranks(rank: int) -> dict[str, Tensor]:
    """Every function on zigzag halves of samples over context parallelism, and on rows over data parallelism."""
    score, mask = make_scores()
    place = torch.arange(24).view(4, 6)
    positions = torch.cat([place[rank], place[3 - rank]])
    group, ids = dist.group.WORLD, torch.arange(4) * 5
    part, part_mask = score[:, positions], mask[:, positions]
    local = {"positions": positions, "cp_group": group}
    return {
        "positions": positions,
        "sequence": top_share(part, part_mask, 0.8, **local),  # type: ignore[arg-type]
        "microbatch": top_share(part, part_mask, 0.6, scope="microbatch", **local),  # type: ignore[arg-type]
        "all": top_share_of_all([part], [part_mask], 0.6, sample_ids=[ids], positions=positions, group=group)[0],
        "shuffle": shuffle_in_samples(part, part_mask, seed=3, step=2, sample_id=ids, **local),  # type: ignore[arg-type]
    }


def test_context_parallel_ranks_agree_with_one() -> None:
    score, mask = make_scores()
    ids = torch.arange(4) * 5
    want = {
        "sequence": top_share(score, mask, 0.8),
        "microbatch": top_share(score, mask, 0.6, scope="microbatch"),
        "all": top_share_of_all([score], [mask], 0.6, sample_ids=[ids], positions=torch.arange(24), group=None)[0],
        "shuffle": shuffle_in_samples(score, mask, seed=3, step=2, sample_id=ids),
    }
    assert want["shuffle"].isfinite().all()
    for result in run_ranks(2, on_ranks):
        for name, whole in want.items():
            assert torch.equal(result[name], whole[:, result["positions"]]), name
