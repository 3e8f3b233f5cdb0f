"""Scores made on the spot: the co-located frozen model runs over a step's microbatches before they are trained on."""

from collections.abc import Sequence

from remit_megatron.data.microbatch import Microbatch
from remit_megatron.mcore.teacher import FrozenReference
from remit_megatron.objectives import Objective
from remit_megatron.scores.source import Filled


class Online:
    """The reference in the student's own groups, run forward-only through Megatron's schedule."""

    def __init__(self, reference: FrozenReference, objective: Objective):
        """objective: what is needed of the reference, one number a token or the whole distribution."""
        self._reference = reference
        self._objective = objective

    def want(self, step: int, *, done: bool = False) -> None:
        """Nothing is made ahead."""

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        return Filled(microbatches=self._reference.scored(microbatches, self._objective), ran_reference=True)

    def close(self) -> None:
        """Nothing is held."""
