"""Token-routed distillation: next-token prediction, with a KL where the reference is not sure."""

from remit_megatron.objectives.base import LossSum, TokenStats
from remit_megatron.objectives.routed import routed_parts, routed_sum
from remit_megatron.objectives.settings_routed import TRKDSettings


class TRKD(TRKDSettings):
    """(1 - kd_alpha) NLL on every token and kd_alpha KL on those routed, a mean over unmasked tokens."""

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum over unmasked tokens. Metrics: see `routed_sum`."""
        _, kl, nll, _ = routed_parts(stats)
        scale = self.temperature**2 if self.scale == "tau_squared" else 1.0
        return routed_sum(self, stats, self.kd_alpha * scale * kl + (1.0 - self.kd_alpha) * nll)
