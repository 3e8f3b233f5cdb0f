"""`remit_weights` against the float64 specification."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remit_megatron.ops import spec
from remit_megatron.ops.weights import remit_weights

ROUNDING = 1.2e-7
"""One rounding to float32 below 2, and the centring sum's resolution."""


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_matches_specification(data: st.DataObject) -> None:
    b, s = data.draw(st.integers(1, 4), "b"), data.draw(st.integers(1, 24), "s")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    scale = data.draw(st.sampled_from([0.01, 3.0, 1e4]), "scale")
    nll, ref_nll = (torch.rand(b, s, generator=generator) * scale for _ in range(2))
    mask = (torch.rand(b, s, generator=generator) < data.draw(st.sampled_from([0.0, 0.1, 0.7, 1.0]), "kept")).float()
    # Ids in any order and with gaps: an id names a document, wherever its tokens are.
    segment_ids = torch.randint(0, s, (b, s), generator=generator) // data.draw(st.integers(1, 6), "documents")
    if data.draw(st.booleans(), "expanded"):  # one number behind all of a sample's positions
        ref_nll, mask = ref_nll[:, :1].expand(b, s), mask[:1].expand(b, s)
    centering: Any = data.draw(st.sampled_from(["sample", "document"]), "centering")
    epsilon = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]), "epsilon")
    clip = data.draw(st.booleans(), "clip")
    want = spec.remit_weights(
        nll, ref_nll, mask, segment_ids=segment_ids, centering=centering, epsilon=epsilon, clip=clip
    )

    garbage = data.draw(st.sampled_from([0.0, torch.inf, -torch.inf, torch.nan]), "masked entries")
    nll = nll.where(mask > 0, garbage)
    if data.draw(st.booleans(), "strided"):
        nll, mask = nll.t().contiguous().t(), mask.repeat_interleave(2, dim=1)[:, ::2]
    before = [x.clone() for x in (nll, ref_nll, mask)]
    weights = remit_weights(
        nll,
        ref_nll,
        mask,
        segment_ids=segment_ids.where(mask > 0, -1) if centering == "document" else None,
        epsilon=epsilon,
        clip=clip,
    )
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), want, rtol=0, atol=ROUNDING)
    assert not weights[mask == 0].any()
    for x, same in zip((nll, ref_nll, mask), before, strict=True):
        torch.testing.assert_close(x, same, rtol=0, atol=0, equal_nan=True)


def test_equal_nll_gives_exactly_one() -> None:
    nll = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) * 20
    segment_ids = torch.arange(40).expand(3, 40) // 7
    for ids in (None, segment_ids):
        for clip in (True, False):
            assert torch.equal(remit_weights(nll, nll.clone(), segment_ids=ids, clip=clip), torch.ones(3, 40))


def test_bounds_of_the_clip() -> None:
    nll = torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    weights = remit_weights(nll, torch.zeros(1, 4), epsilon=0.2)
    assert torch.equal(weights, torch.tensor([[1.2, 0.8, 0.8, 0.8]]))
    free = remit_weights(nll, torch.zeros(1, 4), clip=False)
    assert free.max() < 2
    assert free.min() > 0
    assert free[0, 1] < 0.8


def test_mean_has_the_same_bits_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    nll, ref_nll = (torch.rand(1, 4096, generator=generator) * 10 for _ in range(2))
    order = torch.randperm(4096, generator=generator)
    assert torch.equal(remit_weights(nll, ref_nll)[:, order], remit_weights(nll[:, order], ref_nll[:, order]))


def test_a_group_knows_nothing_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    nll, ref_nll = (torch.rand(2, 12, generator=generator) * 5 for _ in range(2))
    segment_ids = torch.tensor([[0] * 5 + [1] * 7] * 2)
    together = remit_weights(nll, ref_nll, segment_ids=segment_ids)
    alone = [remit_weights(nll[:, cut], ref_nll[:, cut]) for cut in (slice(0, 5), slice(5, 12))]
    assert torch.equal(together, torch.cat(alone, dim=1))
    assert torch.equal(remit_weights(nll, ref_nll)[1:], remit_weights(nll[1:], ref_nll[1:]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e6])
def test_unusable_gap_poisons_its_group_only(value: float) -> None:
    nll = torch.ones(2, 6)
    nll[0, 2] = value
    weights = remit_weights(nll, torch.ones(2, 6), segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1]] * 2))
    assert weights[0, :3].isnan().all()
    assert torch.equal(weights[0, 3:], torch.ones(3))
    assert torch.equal(weights[1], torch.ones(6))


def test_no_gradient_flows() -> None:
    nll = torch.rand(1, 5, requires_grad=True)
    assert not remit_weights(nll, torch.rand(1, 5)).requires_grad


def test_wrong_arguments_are_refused() -> None:
    nll = torch.zeros(2, 3)
    with pytest.raises(AssertionError, match=r"\[b, s\]"):
        remit_weights(nll[0], nll[0])
    with pytest.raises(AssertionError, match="ref_nll"):
        remit_weights(nll, nll[:1])
    with pytest.raises(AssertionError, match="mask"):
        remit_weights(nll, nll, nll[:1])
    with pytest.raises(AssertionError, match="segment_ids"):
        remit_weights(nll, nll, segment_ids=nll)
    for epsilon in (-0.1, 1.1):
        with pytest.raises(AssertionError, match="epsilon"):
            remit_weights(nll, nll, epsilon=epsilon)
