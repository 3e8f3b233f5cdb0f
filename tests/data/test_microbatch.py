"""Microbatches: what a user's own batch may hold, and that every rank's part is of the positions it should be."""

import dataclasses
from typing import Any

import pytest
import torch

from remit_megatron.data.deal import Deal
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.errors import UserError

CPU = torch.device("cpu")


def batch(**changes: Any) -> dict[str, Any]:
    """[2, 8], every value another one."""
    found: dict[str, Any] = {
        "tokens": torch.arange(16).view(2, 8),
        "labels": torch.arange(100, 116).view(2, 8),
        "loss_mask": torch.ones(2, 8),
    }
    return {**found, **changes}


def test_local_cuts_every_field_but_documents() -> None:
    ref_nll = torch.rand(2, 8)
    given = batch(
        segment_ids=torch.arange(200, 216).view(2, 8),
        documents=torch.arange(300, 316).view(2, 8),
        sample_id=torch.tensor([7, 9]),
        ref_nll=ref_nll,
    )
    deal = Deal(cp_rank=1, cp_size=2)
    places = [2, 3, 4, 5]
    local = Microbatch.from_dict(given, deal).local(deal, CPU)
    for key in ("tokens", "labels", "loss_mask", "segment_ids"):
        assert torch.equal(getattr(local, key), given[key][:, places]), key
    assert local.scores is not None
    assert local.scores.ref_nll is not None
    assert torch.equal(local.scores.ref_nll, ref_nll[:, places])
    assert local.documents is not None
    assert torch.equal(local.documents, given["documents"])
    assert local.sample_id is not None
    assert local.sample_id.tolist() == [7, 9]
    assert local.positions.tolist() == places
    assert local.position_ids.tolist() == [places, places]


def test_own_position_ids_are_kept() -> None:
    """Positions that start anew in each document."""
    own = torch.arange(8).remainder(3).expand(2, 8)
    deal = Deal(cp_rank=0, cp_size=2)
    local = Microbatch.from_dict(batch(position_ids=own), deal).local(deal, CPU)
    assert local.position_ids.tolist() == [[0, 1, 0, 1]] * 2
    assert local.positions.tolist() == [0, 1, 6, 7]


def test_what_is_of_this_rank_is_not_cut_again() -> None:
    deal = Deal(cp_rank=1, cp_size=2)
    scores = Scores(
        ref_nll=torch.rand(2, 4), hidden=torch.rand(2, 4, 3), entropy=torch.rand(2, 4), agrees=torch.ones(2, 4)
    )
    whole = Microbatch(**batch()).with_scores(scores).with_selected(torch.ones(2, 4))
    local = whole.local(deal, CPU)
    assert local.scores is not None
    given = [field.name for field in dataclasses.fields(Scores) if getattr(scores, field.name) is not None]
    assert len(given) == 4
    for name in given:
        assert torch.equal(getattr(local.scores, name), getattr(scores, name)), name
    assert local.selected is not None
    assert local.selected.shape == (2, 4)


def test_concatenate_joins_scores_too() -> None:
    parts = [Microbatch(**batch()).with_scores(Scores(ref_nll=torch.full((2, 8), float(i)))) for i in range(3)]
    whole = Microbatch.concatenate(parts)
    assert (whole.num_samples, whole.length) == (6, 8)
    assert whole.scores is not None
    assert whole.scores.ref_nll is not None
    assert whole.scores.ref_nll[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert whole.segment_ids is None
    assert Microbatch.concatenate(parts[:1]) is parts[0]
    with pytest.raises(AssertionError, match="only some microbatches have scores"):
        Microbatch.concatenate([Microbatch(**batch()), parts[0]])


def test_absent_and_none_are_the_same() -> None:
    found = Microbatch.from_dict(batch(attention_mask=None, cu_seqlens=None, sample_id=None), Deal())
    assert found.sample_id is None


MASK = torch.ones(2, 1, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": MASK}, "'attention_mask' is not read: attention is causal, and stays inside documents"),
        ({"cu_seqlens": torch.zeros(3)}, "'cu_seqlens' is not read: packed lengths are not read: give `documents`"),
        ({"cu_seqlens_q_padded": torch.zeros(3)}, "'cu_seqlens_q_padded' is not read: packed lengths"),
        ({"max_seqlen": torch.tensor(8)}, "'max_seqlen' is not read: packed lengths"),
        ({"packed_seq_params": object()}, "'packed_seq_params' is not read: packed lengths"),
        ({"segment_id": torch.zeros(2, 8)}, "'segment_id' is not read: did you mean 'segment_ids'?"),
        ({"weights": torch.zeros(2, 8)}, "'weights' is not read: known are documents, labels"),
        ({"labels": None}, "the batch has no 'labels'"),
        ({"loss_mask": torch.ones(2, 4)}, "'loss_mask' has the shape [2, 4]: it must be [b, s]"),
        ({"sample_id": torch.zeros(2, 8)}, "'sample_id' has the shape [2, 8]: it must be [b]"),
        ({"tokens": torch.zeros(8), "labels": torch.zeros(8), "loss_mask": torch.ones(8)}, "must be [b, s]"),
    ],
)
def test_no_key_is_dropped_in_silence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Microbatch.from_dict(batch(**changes), Deal())
    assert message in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_that_megatron_cut_is_refused(rank: int) -> None:
    deal = Deal(cp_rank=rank, cp_size=2)
    whole = batch(position_ids=torch.arange(8).expand(2, 8))
    cut = {key: deal.cut(value) for key, value in whole.items()}
    Microbatch.from_dict(whole, deal)
    with pytest.raises(UserError, match="was cut for context parallelism already"):
        Microbatch.from_dict(cut, deal)


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    short = {key: value[:, :6] for key, value in batch().items()}
    with pytest.raises(UserError, match="6 positions do not divide by 2 x 2"):
        Microbatch.from_dict(short, Deal(cp_size=2))
