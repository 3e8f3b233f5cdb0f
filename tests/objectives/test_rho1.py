"""RHO-1 and shuffled weights: values and gradients against plain float64, counts, and their limits."""

import pytest
import torch
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.objectives import LossSum, Objective, Remit, Rho1, TokenStats, build_objective
from remit_megatron.objectives.ntp import NTP
from remit_megatron.ops import spec
from remit_megatron.ops.token_nll import token_nll
from tests.objectives.test_objectives import given, make_stats
from tests.ops.cases import gradient_of


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("share", [0.8, 0.35, 1.0])
def test_matches_specification(scope: str, share: float) -> None:
    stats = make_stats()
    result = build_objective({"name": "rho1", "share": share, "scope": scope})(stats)
    result.loss_sum.backward()
    nll, ref_nll, kept = stats.nll.detach().double(), given(stats.ref_nll).double(), stats.mask > 0
    chosen = spec.top_share(nll - ref_nll, stats.mask, str(share), scope)  # type: ignore[arg-type]
    count = int(chosen.sum())
    assert (count == kept.sum()) == (share == 1.0)
    assert result.num_tokens.dtype == torch.int32
    assert int(result.num_tokens) == count
    assert torch.equal(gradient_of(stats.nll).double(), chosen)
    mean = (nll.where(chosen > 0, 0.0).sum() / count).item()
    # Sums in float32, metrics in float64 of float32 numbers.
    assert result.loss_sum.item() / count == pytest.approx(mean, rel=5e-7)
    want = {
        "loss": mean,
        "nll": nll[kept].mean().item(),
        "ref_nll": ref_nll[kept].mean().item(),
        "gap": (nll - ref_nll)[kept].mean().item(),
        "selected": count / int(kept.sum()),
    }
    assert {name: ratio.read() for name, ratio in result.metrics.items()} == pytest.approx(want, rel=1e-12)


def through_logits(objective: Objective, mask: Tensor) -> tuple[LossSum, Tensor]:
    """The objective on a small head's NLL; its gradient with respect to the logits."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 3, 37, generator=generator).requires_grad_()
    labels = torch.randint(0, 37, (12, 3), generator=generator)
    ref_nll = torch.rand(3, 12, generator=generator) * 4
    nll = token_nll(logits, labels).t()
    result = objective(TokenStats(nll=nll, ref_nll=ref_nll, mask=mask, sample_id=torch.arange(3), step=1))
    (result.loss_sum / 7).backward()
    return result, gradient_of(logits)


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_share_1_is_ntp_bit_for_bit(scope: str) -> None:
    mask = make_stats().mask
    ntp, ntp_gradient = through_logits(NTP(), mask)
    rho1, gradient = through_logits(build_objective({"name": "rho1", "share": 1.0, "scope": scope}), mask)
    assert torch.equal(rho1.loss_sum, ntp.loss_sum)
    assert torch.equal(gradient, ntp_gradient)
    assert rho1.num_tokens == ntp.num_tokens
    assert rho1.metrics["loss"].read() == ntp.metrics["loss"].read()


def test_epsilon_0_is_ntp_bit_for_bit() -> None:
    mask = make_stats().mask
    ntp, ntp_gradient = through_logits(NTP(), mask)
    remit, gradient = through_logits(Remit(epsilon=0.0), mask)
    assert torch.equal(remit.loss_sum, ntp.loss_sum)
    assert torch.equal(gradient, ntp_gradient)


def test_shuffled_weights_keep_everything_but_the_place() -> None:
    mask = make_stats().mask
    (plain, plain_gradient), (control, gradient) = (
        through_logits(Remit(shuffle=shuffle), mask) for shuffle in (False, True)
    )
    for name in ("nll", "ref_nll", "gap", "weight", "weight_sq", "clipped_low", "clipped_high"):
        assert control.metrics[name].read() == pytest.approx(plain.metrics[name].read(), rel=1e-12), name
    assert control.num_tokens == plain.num_tokens
    assert not torch.equal(gradient, plain_gradient)
    other, _ = through_logits(Remit(shuffle=True, shuffle_seed=1), mask)
    assert other.loss_sum != control.loss_sum


def test_a_reference_score_that_is_not_finite_reaches_the_loss() -> None:
    stats = make_stats()
    ref_nll = given(stats.ref_nll).clone()
    ref_nll[0, int(stats.mask[0].argmax())] = torch.nan
    result = Rho1()(TokenStats(nll=stats.nll, ref_nll=ref_nll, mask=stats.mask))
    assert result.loss_sum.isnan()


def test_selection_over_the_step_is_taken_as_given() -> None:
    stats = make_stats()
    chosen = stats.mask * (torch.arange(12) % 2)
    objective = Rho1(scope="global")
    assert (objective.global_share, objective.by_sample, Rho1().by_sample) == (0.8, False, True)
    settings = {"nll": stats.nll, "ref_nll": stats.ref_nll, "mask": stats.mask}
    result = objective(TokenStats(**settings, selected=chosen))  # type: ignore[arg-type]
    result.loss_sum.backward()
    assert torch.equal(gradient_of(stats.nll), chosen)
    with pytest.raises(AssertionError, match="selected over the whole step"):
        objective(TokenStats(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "value"), [("share", 0.0), ("share", 1.5), ("share", float("nan")), ("scope", "row")])
def test_wrong_settings_name_the_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"objective.{key} must be"):
        build_objective({"name": "rho1", key: value})
