"""What happens after a step, beside the step itself. Hooks are called in order, on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.errors import RunError
from remit_megatron.run.watchdog import Watchdog
from remit_megatron.train.held_out import Evaluator
from remit_megatron.train.step import Progress
from remit_megatron.train.student import Student
from remit_megatron.train.tokens import TokenRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A step is complete."""

    step: int
    line: dict[str, Any]
    """Its line of metrics.jsonl, which hooks may add to until it is written."""
    is_last: bool
    """Whether it is the run's last step."""
    is_stop: bool
    """Whether this start ends here, because it was asked to."""


Hook = Callable[[Moment], None]


def every(steps: int, hook: Hook, *, at_stop: bool = False) -> Hook:
    """`hook` after each so many steps, and after the last one; 0: after the last one only.

    at_stop: also where the run stops on request.
    """

    def due(moment: Moment) -> None:
        if moment.is_last or (steps and moment.step % steps == 0) or (at_stop and moment.is_stop):
            hook(moment)

    return due


def evaluation(student: Student, evaluator: Evaluator, watchdog: Watchdog, device: torch.device) -> Hook:
    """Held-out NLL, into the step's line."""

    def evaluate(moment: Moment) -> None:
        chunks = student.complete()
        with watchdog.slow("an evaluation"):
            moment.line.update(evaluator.run(chunks, device))

    return evaluate


def token_records(student: Student, records: TokenRecords) -> Hook:
    """What happens to single tokens, on disk, and a histogram of their weights into the step's line."""

    def record(moment: Moment) -> None:
        moment.line.update(records.record(moment.step, student.complete()))

    return record


def refusal_of_divergence(recipe: Recipe, progress: Progress, say: Callable[[str], None]) -> Hook:
    """Says that a step was skipped. Raises RunError where too many were in a row."""
    limit = recipe.optimizer.max_bad_steps

    def refuse(moment: Moment) -> None:
        bad_steps = progress.meta.bad_steps
        if bad_steps:
            say(f"step {moment.step}: the gradient norm is not finite: no update ({bad_steps} in a row)")
        if bad_steps >= limit:
            raise RunError(
                f"{bad_steps} steps in a row had a gradient norm that is not finite (optimizer.max_bad_steps = "
                f"{limit}), last at step {moment.step}: look at the data of these steps, or start another run folder "
                f"with model.init = '{recipe.run}' and a lower optimizer.peak_lr"
            )

    return refuse
