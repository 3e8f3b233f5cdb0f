"""Next-token prediction (Equation 2): every unmasked token has weight 1."""

from remit_megatron.objectives.base import LossSum, TokenStats, kept_tokens, mean_over
from remit_megatron.objectives.settings import NTPSettings


class NTP(NTPSettings):
    """The baseline."""

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum of the NLL over unmasked tokens. Metrics: loss, nll."""
        kept, nll, num_tokens = kept_tokens(stats)
        mean_nll = mean_over(kept, nll)
        return LossSum(loss_sum=nll.sum(), num_tokens=num_tokens, metrics={"loss": mean_nll, "nll": mean_nll})
