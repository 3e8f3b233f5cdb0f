"""Distillation (Equation 12): the KL to the reference over the full vocabulary, optionally mixed with NTP."""

from remit_megatron.objectives.base import LossSum, TokenStats, kept_tokens, mean_over
from remit_megatron.objectives.settings import KDSettings


class KD(KDSettings):
    """kd_alpha scale KL + (1 - kd_alpha) NLL, a mean over unmasked tokens."""

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum over unmasked tokens. Metrics: loss, nll, and kl without the scale."""
        assert stats.kl is not None, "kd needs the KL to the reference"
        kept, nll, num_tokens = kept_tokens(stats)
        kl = stats.kl.where(kept, 0.0)
        scale = self.temperature**2 if self.scale == "tau_squared" else 1.0
        token_loss = self.kd_alpha * scale * kl + (1.0 - self.kd_alpha) * nll
        metrics = {name: mean_over(kept, x) for name, x in (("loss", token_loss), ("nll", nll), ("kl", kl))}
        return LossSum(loss_sum=token_loss.sum(), num_tokens=num_tokens, metrics=metrics)
