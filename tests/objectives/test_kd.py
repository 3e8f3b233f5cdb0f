"""Distillation's mix: values, gradients, NTP at alpha 0, settings. The KL itself is tested in tests/ops."""

import pytest
import torch

from remit_megatron.errors import UserError
from remit_megatron.objectives import KD, TokenStats, build_objective
from remit_megatron.objectives.ntp import NTP
from tests.objectives.test_objectives import make_stats
from tests.ops.cases import gradient_of


def with_kl() -> tuple[TokenStats, torch.Tensor]:
    stats = make_stats()
    generator = torch.Generator().manual_seed(3)
    kl = (torch.rand(3, 12, generator=generator) * 2).where(stats.mask > 0, torch.nan).requires_grad_()
    return TokenStats(nll=stats.nll, mask=stats.mask, kl=kl), kl


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_mix(alpha: float) -> None:
    stats, kl = with_kl()
    result = build_objective({"name": "kd", "kd_alpha": alpha})(stats)
    result.loss_sum.backward()
    kept = stats.mask > 0
    nll_mean, kl_mean = (x.detach().double()[kept].mean().item() for x in (stats.nll, kl))
    loss = alpha * kl_mean + (1 - alpha) * nll_mean
    assert int(result.num_tokens) == kept.sum()
    assert result.num_tokens.dtype == torch.int32
    # Products and the sum in float32.
    assert result.loss_sum.item() / int(kept.sum()) == pytest.approx(loss, rel=5e-7)
    read = {name: ratio.read() for name, ratio in result.metrics.items()}
    assert read == pytest.approx({"loss": loss, "nll": nll_mean, "kl": kl_mean}, rel=5e-7)
    for leaf, factor in ((kl, alpha), (stats.nll, 1 - alpha)):
        torch.testing.assert_close(gradient_of(leaf), stats.mask * factor, rtol=1e-7, atol=0)


def test_alpha_0_is_ntp_bit_for_bit() -> None:
    stats, _ = with_kl()
    assert torch.equal(KD(kd_alpha=0.0)(stats).loss_sum, NTP()(stats).loss_sum)


@pytest.mark.parametrize(
    ("key", "value"),
    [("kd_alpha", 1.1), ("kd_alpha", -0.1), ("temperature", 0.0), ("temperature", float("inf")), ("top_k", -1)],
)
def test_wrong_settings_name_the_key(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"objective.{key} must be"):
        build_objective({"name": "kd", key: value})


def test_missing_kl_is_refused() -> None:
    with pytest.raises(AssertionError, match="KL"):
        KD()(make_stats())
