"""Where a step's scores come from: one interface, whoever makes them.

A frozen model's score travels with each token: `fill` takes a step's microbatches and gives them back with `scores`.
`Online` runs the co-located model, `Cached` reads a folder that was made ahead, `Queued` takes what a scorer makes
beside the run, and `Kept` writes what another source has made, and reads it where it is needed again. `open_source`
(scores/open.py) chooses by the recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from remit_megatron.data.microbatch import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A step's microbatches with scores, and what it took."""

    microbatches: list[Microbatch]
    """Those given, in order; `scores` is set on the ranks of the last pipeline stage, which compute the loss."""
    ran_reference: bool
    """Whether the frozen model had to run in this process."""
    waited_ms: float = 0.0
    """How long this rank waited for somebody else's scores."""


class ScoreSource(Protocol):
    """Scores of a run's steps, in the order of the steps. Every method is collective."""

    def want(self, step: int, *, done: bool = False) -> None:
        """Say that `step` is the next to be filled, at the start and after steps that were filled elsewhere, so that
        who makes scores ahead goes on from there. done: none is, the run is over."""
        ...

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        """This rank's microbatches of a step, with scores. Raises RunError where there are none to be had."""
        ...

    def close(self) -> None:
        """Let go of files and locks. May be called more than once, and after a failure."""
        ...
