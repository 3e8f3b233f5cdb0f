"""ReMiT (Equations 3 to 6): tokens on which the reference is more confident than the sample's mean weigh more."""

from torch import Tensor

from remit_megatron.objectives.base import LossSum, TokenStats, kept_tokens, mean_over
from remit_megatron.objectives.settings import RemitSettings
from remit_megatron.ops.selection import shuffle_in_samples
from remit_megatron.ops.weights import remit_weights


class Remit(RemitSettings):
    """sum of w nll over unmasked tokens, w = clip(2 sigmoid(gap - mean gap))."""

    def weights(self, stats: TokenStats) -> Tensor:
        """The tokens' weights, [b, s] float32, constants for autograd; 0 at masked tokens."""
        assert stats.ref_nll is not None, "remit needs the reference's NLL"
        segment_ids = None
        if self.centering == "document":
            assert stats.segment_ids is not None, "centering by document needs segment_ids"
            segment_ids = stats.segment_ids
        kept, nll, _ = kept_tokens(stats)
        return remit_weights(
            nll,
            stats.ref_nll.where(kept, 0.0),
            stats.mask,
            segment_ids=segment_ids,
            epsilon=self.epsilon,
            clip=self.clip,
            cp_group=stats.cp_group,
        )

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum of w * nll over unmasked tokens.

        Metrics: loss, nll, ref_nll, gap, weight, weight_sq, and with clip the shares clipped_low and clipped_high.
        """
        assert stats.ref_nll is not None, "remit needs the reference's NLL"
        kept, nll, num_tokens = kept_tokens(stats)
        ref_nll = stats.ref_nll.where(kept, 0.0)
        weights = self.weights(stats)
        if self.shuffle:
            assert stats.sample_id is not None, "shuffled weights need sample_id"
            weights = shuffle_in_samples(
                weights,
                stats.mask,
                seed=self.shuffle_seed,
                step=stats.step,
                sample_id=stats.sample_id,
                positions=stats.positions,
                cp_group=stats.cp_group,
            )
        token_loss = weights * nll
        metrics = {
            "loss": mean_over(kept, token_loss),
            "nll": mean_over(kept, nll),
            "ref_nll": mean_over(kept, ref_nll),
            "gap": mean_over(kept, nll.detach().double() - ref_nll.double()),
            "weight": mean_over(kept, weights),
            "weight_sq": mean_over(kept, weights.double().square()),
        }
        if self.clip:
            metrics["clipped_low"] = mean_over(kept, weights <= 1.0 - self.epsilon)
            metrics["clipped_high"] = mean_over(kept, weights >= 1.0 + self.epsilon)
        return LossSum(loss_sum=token_loss.sum(), num_tokens=num_tokens, metrics=metrics)
