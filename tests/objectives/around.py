"""An objective around another one, for tests that look at what it is given or change what it gives."""

from typing import Any

from remit_megatron.objectives import Distribution, LossSum, Need, Objective, Routing, TokenStats


class Around:
    """Passes everything on to `inner`; subclasses change what they are about."""

    def __init__(self, inner: Any):
        self.inner: Objective = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.inner.metrics

    @property
    def by_sample(self) -> bool:
        return self.inner.by_sample

    @property
    def remark(self) -> str | None:
        return self.inner.remark

    @property
    def distribution(self) -> Distribution:
        return self.inner.distribution

    @property
    def global_share(self) -> float | None:
        return self.inner.global_share

    @property
    def routing(self) -> Routing | None:
        return self.inner.routing

    @property
    def needs_reference(self) -> bool:
        return self.inner.needs_reference

    def __call__(self, stats: TokenStats) -> LossSum:
        return self.inner(stats)
