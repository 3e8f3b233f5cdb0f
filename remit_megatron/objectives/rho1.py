"""RHO-1: train on the share of tokens with the highest excess loss over the reference, drop the others."""

import torch

from remit_megatron.objectives.base import LossSum, Ratio, TokenStats, kept_tokens, mean_over
from remit_megatron.objectives.settings import Rho1Settings
from remit_megatron.ops.selection import top_share


class Rho1(Rho1Settings):
    """Sum of the NLL over selected tokens, divided by their number."""

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum of the NLL over selected tokens; `num_tokens` counts these.

        Metrics: loss (mean over selected tokens), nll, ref_nll, gap (over unmasked ones), and selected, whose numerator
        and denominator are the two counts.
        """
        assert stats.ref_nll is not None, "rho1 needs the reference's NLL"
        kept, nll, _ = kept_tokens(stats)
        ref_nll = stats.ref_nll.where(kept, 0.0)
        gap = nll.detach().double() - ref_nll.double()
        if self.scope == "global":
            assert stats.selected is not None, "scope 'global' needs tokens that were selected over the whole step"
            selected = stats.selected
        else:
            selected = top_share(
                gap, stats.mask, self.share, scope=self.scope, positions=stats.positions, cp_group=stats.cp_group
            )
        token_loss = selected * nll
        chosen = selected != 0  # also where NaN says that the selection failed
        metrics = {
            "loss": mean_over(chosen, token_loss),
            "nll": mean_over(kept, nll),
            "ref_nll": mean_over(kept, ref_nll),
            "gap": mean_over(kept, gap),
            "selected": Ratio(chosen.sum().double(), kept.sum().double()),
        }
        return LossSum(loss_sum=token_loss.sum(), num_tokens=chosen.sum(dtype=torch.int32), metrics=metrics)
