"""Distillation (Equation 12): forward KL to the reference over the full vocabulary, optionally mixed with NTP."""

from dataclasses import dataclass
from typing import ClassVar

from remit_megatron.errors import UserError
from remit_megatron.objectives.base import LossSum, TokenStats, kept_tokens, mean_over


@dataclass(frozen=True, slots=True)
class KD:
    """kd_alpha KL(reference || student) + (1 - kd_alpha) NLL, a mean over unmasked tokens."""

    kd_alpha: float = 1.0
    """Share of the KL; 1 is the paper's objective, 0 is NTP."""
    temperature: float = 1.0
    """Divides both models' logits in the KL, which is not scaled up by its square."""

    top_k: int = 0
    """Above 0: the KL is over so many tokens, the reference's most probable, and one bucket for all others: a lower
    bound of the KL over the vocabulary, which 0 stands for."""

    name: ClassVar[str] = "kd"
    needs_reference: ClassVar[bool] = True
    needs_reference_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.kd_alpha <= 1.0:
            raise UserError(f"objective.kd_alpha must be in [0, 1], got {self.kd_alpha}")
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(f"objective.temperature must be positive, got {self.temperature}")

        if self.top_k < 0:
            raise UserError(f"objective.top_k must be 0 or more, got {self.top_k}")

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum over unmasked tokens. Metrics: loss, nll, kl."""
        assert stats.kl is not None, "kd needs the KL to the reference"
        kept, nll, num_tokens = kept_tokens(stats)
        kl = stats.kl.where(kept, 0.0)
        token_loss = self.kd_alpha * kl + (1.0 - self.kd_alpha) * nll
        metrics = {name: mean_over(kept, x) for name, x in (("loss", token_loss), ("nll", nll), ("kl", kl))}
        return LossSum(loss_sum=token_loss.sum(), num_tokens=num_tokens, metrics=metrics)
