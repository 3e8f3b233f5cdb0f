"""Settings of the objectives that send some tokens to the reference and the others to their labels."""

from typing import Literal

from remit_megatron.objectives.needs import (
    Distribution,
    Need,
    ObjectiveSettings,
    PositiveFloat,
    SelectableOrNone,
    ShareOfOne,
)
from remit_megatron.ops.choices import RoutedBy, Routing, RoutingScope

NEEDS = frozenset({Need.DISTRIBUTION, Need.ENTROPY, Need.AGREEMENT, Need.ROUTING})
ROUTED = ("loss", "nll", "routed", "ref_entropy")
OF_BOTH_GROUPS = ("kl_routed", "kl_rest", "nll_routed", "nll_rest", "agrees_routed", "agrees_rest")


class SwitchSettings(ObjectiveSettings):
    """Switch Distillation (arXiv 2609.01532): KL where the reference is sure, NLL on the other tokens."""

    name: Literal["switch"] = "switch"
    share: SelectableOrNone = 0.2
    """Share of the unmasked tokens that goes to the reference, those of its lowest entropy; counts are rounded up."""
    temperature: PositiveFloat = 2.0
    """Divides both models' logits in the KL, which is multiplied by its square, and the reference's for the entropy."""
    direction: Literal["forward", "reverse"] = "reverse"
    """"reverse": KL(student || reference), the authors'; "forward": KL(reference || student), their ablation."""
    means: Literal["group", "token"] = "group"
    """"group": each group's sum is divided by the number of its tokens in the global batch; "token": by that of all."""
    scope: RoutingScope = "global"
    """Where tokens compete. "microbatch" depends on how the batch is cut."""
    route: Literal["entropy", "random", "correct"] = "entropy"
    """Ablations: a random choice of the same size; the tokens whose label is the reference's most probable one."""
    route_seed: int = 1234
    """With the step, the sample and the position it fixes a random choice."""
    target: Literal["distribution", "top1"] = "distribution"
    """Ablation "top1": the reference's most probable token as a hard label, an NLL in place of the KL."""
    nll_on: Literal["rest", "all"] = "rest"
    """Ablation "all": the NLL is taken on every token, also where the KL is."""

    @property
    def needs(self) -> frozenset[Need]:
        return NEEDS

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*ROUTED, *(("entropy_threshold",) if self.route == "entropy" else ()), *OF_BOTH_GROUPS)

    @property
    def distribution(self) -> Distribution:
        compare = "top1" if self.target == "top1" else self.direction
        return Distribution(temperature=self.temperature, compare=compare)

    @property
    def routing(self) -> Routing:
        by: RoutedBy = "low_entropy" if self.route == "entropy" else self.route
        return Routing(share=self.share, by=by, scope=self.scope, seed=self.route_seed)

    @property
    def remark(self) -> str | None:
        return _remark(self.scope if self.route != "correct" else "global")


class TRKDSettings(ObjectiveSettings):
    """Token-routed distillation (arXiv 2509.01649): NLL everywhere, and KL where the reference is not sure."""

    name: Literal["trkd"] = "trkd"
    share: SelectableOrNone = 0.85
    """Share of the unmasked tokens with the KL, those of the reference's highest entropy; counts are rounded up."""
    kd_alpha: ShareOfOne = 0.5
    """Share of the KL; the NLL has the rest, on every token."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the KL, and the reference's for the entropy."""
    scale: Literal["none", "tau_squared"] = "none"
    """"tau_squared": the KL is multiplied by the squared temperature."""
    direction: Literal["forward", "reverse"] = "forward"
    """"forward": KL(reference || student), the authors'; "reverse": KL(student || reference)."""
    scope: RoutingScope = "sequence"
    """Where tokens compete. "microbatch" depends on how the batch is cut."""

    @property
    def needs(self) -> frozenset[Need]:
        return NEEDS

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*ROUTED, "entropy_threshold", *OF_BOTH_GROUPS)

    @property
    def distribution(self) -> Distribution:
        return Distribution(temperature=self.temperature, compare=self.direction)

    @property
    def routing(self) -> Routing:
        return Routing(share=self.share, by="high_entropy", scope=self.scope)

    @property
    def remark(self) -> str | None:
        return _remark(self.scope)


def _remark(scope: RoutingScope) -> str | None:
    if scope != "microbatch":
        return None
    return "objective.scope = 'microbatch': which tokens are routed depends on batch.microbatch_samples and ranks"
