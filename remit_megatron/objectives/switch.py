"""Switch Distillation: reverse KL where the reference is sure, next-token prediction elsewhere."""

from remit_megatron.objectives.base import LossSum, TokenStats
from remit_megatron.objectives.routed import routed_parts, routed_sum
from remit_megatron.objectives.settings_routed import SwitchSettings


class Switch(SwitchSettings):
    """tau^2 / |S| sum over S of KL + 1 / |S'| sum over the rest of NLL, with the sizes of the global batch."""

    def __call__(self, stats: TokenStats) -> LossSum:
        """Sum over unmasked tokens, each group's times N / size where means = "group": the mean over all N unmasked
        tokens of the global batch is then the sum of the groups' own means. Metrics: see `routed_sum`."""
        routed, kl, nll, rest = routed_parts(stats)
        scale = 1.0 if self.target == "top1" else self.temperature**2
        distilled, labelled = scale * kl, nll if self.nll_on == "all" else nll.where(rest, 0.0)
        if self.means == "group":
            distilled = routed.balance * distilled
            labelled = labelled if self.nll_on == "all" else routed.balance * labelled
        return routed_sum(self, stats, distilled + labelled)
