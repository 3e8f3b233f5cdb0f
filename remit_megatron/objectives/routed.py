"""What objectives with routed tokens have in common: which tokens are the reference's, and how both groups fare."""

from torch import Tensor

from remit_megatron.objectives.base import LossSum, Ratio, TokenStats, kept_tokens, mean_over
from remit_megatron.objectives.needs import ObjectiveSettings
from remit_megatron.ops.routing import Routed


def routed_parts(stats: TokenStats) -> tuple[Routed, Tensor, Tensor, Tensor]:
    """(what was routed; the KL of routed tokens, 0 elsewhere; the NLL of unmasked tokens, 0 elsewhere; whether a token
    is unmasked and not routed), each [b, s]. A choice that failed makes the KL of its tokens NaN."""
    assert stats.routed is not None, "routed tokens are chosen before the student runs: `routed` is needed"
    assert stats.kl is not None, "routed tokens need the comparison with the reference"
    kept, nll, _ = kept_tokens(stats)
    chosen = stats.routed.chosen
    kl = chosen * stats.kl.where(chosen != 0, 0.0)  # the choice is NaN where it failed
    return stats.routed, kl, nll, kept & (chosen == 0)


def routed_sum(objective: ObjectiveSettings, stats: TokenStats, token_loss: Tensor) -> LossSum:
    """The sum of token_loss [b, s], which is 0 at masked tokens, over all unmasked ones.

    Metrics: loss, nll, ref_entropy, over unmasked tokens; routed, the share of them; entropy_threshold, the entropy at
    the border between the groups, a mean over tokens where there are several; kl, nll and agrees of routed and of other
    tokens. The KL of other tokens is of those of them that were compared.
    """
    routed, kl, entropy, agrees = stats.routed, stats.kl, stats.ref_entropy, stats.ref_agrees
    assert routed is not None
    assert kl is not None
    assert entropy is not None, "routed tokens are chosen by the reference's entropy"
    assert agrees is not None, "routed tokens are compared by the reference's agreement with the label"
    kept, nll, num_tokens = kept_tokens(stats)
    on = kept & (routed.chosen != 0)
    off = kept & (routed.chosen == 0)
    metrics = {
        "loss": mean_over(kept, token_loss),
        "nll": mean_over(kept, nll),
        "routed": Ratio(on.sum().double(), kept.sum().double()),
        "ref_entropy": mean_over(kept, entropy),
        "entropy_threshold": mean_over(kept & routed.threshold.isfinite(), routed.threshold),
        "kl_routed": mean_over(on, kl),
        "kl_rest": mean_over(off & routed.compared, kl),
        "nll_routed": mean_over(on, nll),
        "nll_rest": mean_over(off, nll),
        "agrees_routed": mean_over(on, agrees),
        "agrees_rest": mean_over(off, agrees),
    }
    return LossSum(
        loss_sum=token_loss.sum(),
        num_tokens=num_tokens,
        metrics={name: metrics[name] for name in objective.metrics},
    )
