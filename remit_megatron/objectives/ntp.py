"""Next-token prediction (Equation 2): every unmasked token has weight 1."""

from dataclasses import dataclass
from typing import ClassVar

from remit_megatron.objectives.base import LossSum, TokenStats, kept_tokens, mean_over


@dataclass(frozen=True, slots=True)
class NTP:
    """The baseline. No settings."""

    name: ClassVar[str] = "ntp"
    needs_reference: ClassVar[bool] = False
    by_sample: ClassVar[bool] = True

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum of the NLL over unmasked tokens. Metrics: loss, nll."""
        kept, nll, num_tokens = kept_tokens(stats)
        mean_nll = mean_over(kept, nll)
        return LossSum(loss_sum=nll.sum(), num_tokens=num_tokens, metrics={"loss": mean_nll, "nll": mean_nll})
