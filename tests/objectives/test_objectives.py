"""Objectives: values against the specification, sums that add up over any cut, neutrality, and settings."""

from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.objectives import OBJECTIVES, LossSum, Objective, TokenStats, build_objective
from remit_megatron.objectives.ntp import NTP
from remit_megatron.objectives.remit import Remit
from remit_megatron.ops import spec
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import gradient_of

VARIANTS: dict[str, dict[str, Any]] = {
    "ntp": {"name": "ntp"},
    "remit": {"name": "remit"},
    "by document": {"name": "remit", "centering": "document", "epsilon": 0.5},
    "no clip": {"name": "remit", "clip": False},
}


def given(field: Tensor | None) -> Tensor:
    """A field that the statistics of these tests always have."""
    assert field is not None
    return field


SEGMENT_IDS = torch.tensor([[0] * 4 + [1] * 6 + [2] * 2, [0] * 12, [0] * 7 + [1] * 5])


def make_stats() -> TokenStats:
    """[3, 12]: ragged mask, one row without tokens; masked entries are not finite."""
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(3, 12, generator=generator) * 6
    ref_nll = nll + torch.randn(3, 12, generator=generator) * 0.5  # some gaps inside the clip, some beyond
    mask = (torch.rand(3, 12, generator=generator) > 0.4).float()
    mask[1] = 0
    nll, ref_nll = nll.where(mask > 0, torch.inf), ref_nll.where(mask > 0, torch.nan)
    return TokenStats(nll=nll.requires_grad_(), ref_nll=ref_nll, mask=mask, segment_ids=SEGMENT_IDS)


def spec_weights(settings: dict[str, Any], stats: TokenStats) -> Tensor:
    if settings["name"] == "ntp":
        return stats.mask.double()
    options = {key: value for key, value in settings.items() if key != "name"}
    return spec.remit_weights(stats.nll, given(stats.ref_nll), stats.mask, segment_ids=stats.segment_ids, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_specification(variant: str) -> None:
    stats = make_stats()
    result = build_objective(VARIANTS[variant])(stats)
    result.loss_sum.backward()
    weights = spec_weights(VARIANTS[variant], stats)
    kept = stats.mask > 0
    nll, ref_nll = stats.nll.detach().double(), given(stats.ref_nll).double()
    num_tokens = int(kept.sum())

    assert result.num_tokens.dtype == torch.int32
    assert int(result.num_tokens) == num_tokens
    # The spec is float64; the program rounds each weight and product to float32 and sums them in it.
    loss = spec.loss(nll, weights, stats.mask).item()
    assert result.loss_sum.item() / num_tokens == pytest.approx(loss, rel=5e-7)
    torch.testing.assert_close(gradient_of(stats.nll).double(), weights, rtol=0, atol=1.2e-7)
    assert result.metrics["loss"].read() == pytest.approx(loss, rel=5e-7)
    assert result.metrics["nll"].read() == pytest.approx(nll[kept].mean().item(), rel=1e-12)
    if variant == "ntp":
        assert set(result.metrics) == {"loss", "nll"}
        return
    want = {
        "ref_nll": ref_nll[kept].mean(),
        "gap": (nll - ref_nll)[kept].mean(),
        "weight": weights[kept].mean(),
        "weight_sq": weights[kept].square().mean(),
    }
    if variant != "no clip":
        epsilon = VARIANTS[variant].get("epsilon", 0.2)
        want["clipped_low"] = (weights[kept] == 1 - epsilon).double().mean()
        want["clipped_high"] = (weights[kept] == 1 + epsilon).double().mean()
        assert 0 < want["clipped_low"] + want["clipped_high"] < 1
    assert set(result.metrics) == {"loss", "nll", *want}
    for name, value in want.items():
        assert result.metrics[name].read() == pytest.approx(value.item(), rel=5e-7), name


def total(objective: Objective, parts: list[TokenStats]) -> LossSum:
    results = [objective(part) for part in parts]
    metrics = results[0].metrics
    for result in results[1:]:
        metrics = {name: ratio + result.metrics[name] for name, ratio in metrics.items()}
    return LossSum(
        loss_sum=torch.stack([result.loss_sum for result in results]).sum(),
        num_tokens=torch.stack([result.num_tokens for result in results]).sum(),
        metrics=metrics,
    )


def cut(stats: TokenStats, rows: slice, positions: slice = slice(None)) -> TokenStats:
    segment_ids = given(stats.segment_ids)[rows, positions]
    return TokenStats(
        nll=stats.nll[rows, positions],
        ref_nll=given(stats.ref_nll)[rows, positions],
        mask=stats.mask[rows, positions],
        segment_ids=segment_ids - segment_ids.min(),
    )


def check_same(whole: LossSum, split: LossSum) -> None:
    assert split.num_tokens == whole.num_tokens
    torch.testing.assert_close(split.loss_sum, whole.loss_sum, rtol=5e-7, atol=0)
    assert set(split.metrics) == set(whole.metrics)
    for name, ratio in whole.metrics.items():
        assert split.metrics[name].read() == pytest.approx(ratio.read(), rel=1e-12), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [[3], [1, 2], [1, 0, 2], [1, 1, 1]])
def test_any_cut_between_samples_gives_the_same_sums(variant: str, sizes: list[int]) -> None:
    objective = build_objective(VARIANTS[variant])
    stats = make_stats()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True) if size]
    check_same(objective(stats), total(objective, [cut(stats, one) for one in rows]))


@pytest.mark.parametrize("variant", ["ntp", "by document"])
def test_any_cut_between_documents_gives_the_same_sums(variant: str) -> None:
    objective = build_objective(VARIANTS[variant])
    stats = cut(make_stats(), slice(0, 1))
    parts = [cut(stats, slice(None), one) for one in (slice(0, 4), slice(4, 10), slice(10, 12))]
    check_same(objective(stats), total(objective, parts))


def test_microbatch_without_tokens_still_runs_backward() -> None:
    """Ranks that skipped it would leave the others waiting in a collective."""
    for settings in VARIANTS.values():
        stats = cut(make_stats(), slice(1, 2))
        result = build_objective(settings)(stats)
        assert result.loss_sum.requires_grad
        assert result.loss_sum == 0
        assert result.num_tokens == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centering", ["sample", "document"])
def test_reference_equal_to_student_is_ntp_bit_for_bit(dtype: torch.dtype, centering: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(12, 3, 8, generator=generator).to(dtype)
    head = torch.randn(40, 8, generator=generator).to(dtype)
    labels = torch.randint(0, 37, (12, 3), generator=generator)
    mask = make_stats().mask
    ref_nll = linear_nll(hidden.view(36, 8), head, labels.view(36), valid_vocab=37).view(12, 3).t()

    def run(objective: Objective) -> tuple[Tensor, Tensor]:
        weight = head.clone().requires_grad_()
        nll = token_nll(hidden @ weight.t(), labels, valid_vocab=37).t()
        result = objective(TokenStats(nll=nll, ref_nll=ref_nll, mask=mask, segment_ids=SEGMENT_IDS))
        (result.loss_sum / 7).backward()
        return result.loss_sum.detach(), gradient_of(weight)

    remit_loss, remit_gradient = run(Remit(centering=centering))
    ntp_loss, ntp_gradient = run(NTP())
    assert torch.equal(remit_loss, ntp_loss)
    assert torch.equal(remit_gradient, ntp_gradient)
    assert remit_gradient.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "objective.name is missing"),
        ({"name": "remti"}, "unknown objective.name 'remti', did you mean remit?"),
        ({"name": "zzz"}, "unknown objective.name 'zzz': known are ntp"),
        ({"name": "remit", "epsilom": 0.2}, "unknown key objective.epsilom for 'remit', did you mean epsilon?"),
        ({"name": "ntp", "epsilon": 0.2}, "unknown key objective.epsilon for 'ntp': it has no settings"),
        ({"name": "remit", "needs_reference": False}, "unknown key objective.needs_reference"),
        ({"name": "remit", "epsilon": "0.2"}, "objective.epsilon must be of type float, got '0.2'"),
        ({"name": "remit", "epsilon": True}, "objective.epsilon must be of type float, got True"),
        ({"name": "remit", "epsilon": 1.5}, r"objective.epsilon must be in \[0, 1\], got 1.5"),
        ({"name": "remit", "epsilon": float("nan")}, "objective.epsilon must be in"),
        ({"name": "remit", "clip": 1}, "objective.clip must be of type bool, got 1"),
        ({"name": "remit", "centering": "row"}, "objective.centering must be one of sample, document, got 'row'"),
        ({"name": "remit", "centering": 3}, "objective.centering must be of type str, got 3"),
    ],
)
def test_wrong_settings_name_the_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(settings)


def test_settings_reach_the_objective() -> None:
    assert build_objective({"name": "remit", "epsilon": 1, "clip": False}) == Remit(epsilon=1.0, clip=False)
    assert {name: build_objective({"name": name}).name for name in OBJECTIVES} == {name: name for name in OBJECTIVES}
    assert [cls().needs_reference for cls in (NTP, Remit)] == [False, True]


def test_missing_scores_are_refused() -> None:
    nll = torch.ones(1, 3)
    with pytest.raises(AssertionError, match="reference"):
        Remit()(TokenStats(nll=nll, mask=nll))
    with pytest.raises(AssertionError, match="segment_ids"):
        Remit(centering="document")(TokenStats(nll=nll, ref_nll=nll, mask=nll))
