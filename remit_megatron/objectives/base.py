"""The contract between the loss path and an objective."""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from remit_megatron.objectives.needs import Distribution, Need
from remit_megatron.ops.choices import Routing
from remit_megatron.ops.routing import Routed


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Per-token scores of one microbatch on one rank; s is this rank's part under context parallelism."""

    nll: Tensor
    """[b, s] float32: the student's NLL, nats, differentiable. Masked entries may hold anything."""
    ref_nll: Tensor | None = None
    """[b, s] float32: the reference's NLL, nats, no graph. None without a reference."""
    mask: Tensor
    """[b, s] float32: 1 where the token is trained on, else 0."""
    segment_ids: Tensor | None = None
    """[b, s] int64: document number within the whole sample, below s * cp_size. None: documents are not known."""
    cp_group: dist.ProcessGroup | None = None
    """Ranks that hold the other parts of the same samples. None: samples are whole."""
    positions: Tensor | None = None
    """[s] int64: place of each token in its whole sample. None: 0..s-1."""
    sample_id: Tensor | None = None
    """[b] int64: identity of each sample. None: not known."""
    step: int = 0
    """Number of the optimizer step, from 1; 0 outside of a run."""
    kl: Tensor | None = None
    """[b, s] float32: the reference's distribution compared with the student's, as the objective's `distribution`
    says, nats, differentiable. 0 where `routed` is given and does not have the token compared; masked entries may hold
    anything."""
    ref_entropy: Tensor | None = None
    """[b, s] float32: entropy of the reference's distribution, nats, no graph. Masked entries may hold anything."""
    ref_agrees: Tensor | None = None
    """[b, s] float32, no graph: 1 where the reference's most probable token is the label, else 0. Masked entries may
    hold anything."""
    selected: Tensor | None = None
    """[b, s] float32, no graph: 1 where a selection over the whole step took the token, else 0."""
    routed: Routed | None = None
    """What the objective's `routing` made of the tokens."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean kept as numerator and denominator, so that microbatches and ranks add up; divided only when read."""

    num: Tensor
    """Sum over unmasked tokens. Scalar float64, no graph."""
    den: Tensor
    """Number of unmasked tokens. Scalar float64."""

    def __add__(self, other: "Ratio") -> "Ratio":
        return Ratio(self.num + other.num, self.den + other.den)

    def read(self) -> float:
        """num / den; NaN where nothing was counted. Waits for the device."""
        den = float(self.den)
        return float(self.num) / den if den else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSum:
    """A loss that has not been divided: sums travel between microbatches and ranks, and only the trainer divides."""

    loss_sum: Tensor
    """Sum over this rank's unmasked tokens, nats. Scalar float32, differentiable."""
    num_tokens: Tensor
    """What the sum is divided by, summed over the global batch: this rank's unmasked tokens, or those of them that an
    objective selects. Scalar int32: Megatron's schedule accumulates an integer."""
    metrics: dict[str, Ratio]
    """Means over unmasked tokens, by name, those that the objective declares; `loss` and `nll` always. `loss` is over
    the tokens in num_tokens."""


class Objective(Protocol):
    """What is minimised: pure, and told everything by its argument. `ObjectiveSettings` has the properties' meaning,
    and is the base of those that a recipe can name."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def by_sample(self) -> bool: ...

    @property
    def remark(self) -> str | None: ...

    @property
    def distribution(self) -> Distribution: ...

    @property
    def global_share(self) -> float | None: ...

    @property
    def routing(self) -> Routing | None: ...

    @property
    def needs_reference(self) -> bool: ...

    def __call__(self, stats: TokenStats) -> LossSum:
        """Called once a microbatch on every rank that computes the loss, also where all tokens are masked."""
        ...


def kept_tokens(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    """(kept [b, s] bool, nll [b, s] with 0 at masked tokens, number of unmasked tokens as scalar int32)."""
    kept = stats.mask > 0
    # Where, not a product: 0 * inf is nan, in the value and in the gradient.
    return kept, stats.nll.where(kept, 0.0), kept.sum().int()


def mean_over(kept: Tensor, values: Tensor) -> Ratio:
    """Mean of values [b, s] over kept tokens, summed in float64."""
    return Ratio(values.detach().double().where(kept, 0.0).sum(), kept.sum().double())
