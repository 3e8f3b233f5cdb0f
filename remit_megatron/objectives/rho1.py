"""RHO-1: train on the share of tokens with the highest excess loss over the reference, drop the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from remit_megatron.errors import UserError
from remit_megatron.objectives.base import LossSum, Ratio, TokenStats, kept_tokens, mean_over
from remit_megatron.ops.selection import top_share

SCOPES = ("sequence", "microbatch", "global")


@dataclass(frozen=True, slots=True)
class Rho1:
    """Selective language modelling (RHO-1, Equations 3 to 5), by the signed excess loss nll - ref_nll."""

    share: float = 0.8
    """Share of unmasked tokens that is kept; counts are rounded up."""
    scope: Literal["sequence", "microbatch", "global"] = "sequence"
    """Where tokens compete: within each packed sample, within a microbatch (which depends on how the batch is cut), or
    within the step's whole batch (which costs a forward pass of the student more)."""

    name: ClassVar[str] = "rho1"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1e-6 <= self.share <= 1.0:
            raise UserError(f"objective.share must be in (0, 1], at least 1e-6, got {self.share}")
        if self.scope not in SCOPES:
            raise UserError(f"objective.scope must be one of {', '.join(SCOPES)}, got '{self.scope}'")

    @property
    def by_sample(self) -> bool:
        return self.scope == "sequence"

    @property
    def remark(self) -> str | None:
        """What the log says about the setting at the start."""
        if self.scope != "microbatch":
            return None
        return "objective.scope = 'microbatch': which tokens are selected depends on batch.microbatch_samples and ranks"

    @property
    def global_share(self) -> float | None:
        """The share to be selected over the whole step before training on it; see `ForwardStep`."""
        return self.share if self.scope == "global" else None

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
