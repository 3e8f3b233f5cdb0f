"""What happens after a step, beside the step itself. Hooks are called in order, on every rank."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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


MAX_SKIPPED_SHARE = 0.1
"""Of a run's steps, as many may update nothing; with more it is not called done."""

Hook = Callable[[Moment], None]


def every(
    steps: int, hook: Hook, *, at_stop: bool = False, also: Callable[[Moment], bool] = lambda moment: False
) -> Hook:
    """`hook` after each so many steps, and after the last one; 0: after the last one only.

    at_stop: also where the run stops on request. also: at which moments besides.
    """

    def due(moment: Moment) -> None:
        by_step = moment.is_last or (steps and moment.step % steps == 0) or (at_stop and moment.is_stop)
        if by_step or also(moment):
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
        reference = _broken_reference(recipe, moment.line)
        if bad_steps:
            cause = f": {reference}" if reference else ""
            say(f"step {moment.step}: the gradient norm is not finite: no update ({bad_steps} in a row){cause}")
        if bad_steps >= limit:
            remedy = reference or (
                "look at the data of these steps, or start another run folder with "
                f"model.init = '{recipe.run}' and a lower optimizer.peak_lr"
            )
            raise RunError(
                f"{bad_steps} steps in a row had a gradient norm that is not finite (optimizer.max_bad_steps = "
                f"{limit}), last at step {moment.step}: {remedy}"
            )

    return refuse


def _broken_reference(recipe: Recipe, line: dict[str, Any]) -> str | None:
    """That the reference is the cause of a skipped step; None where it is not."""
    if not line.get("broken_scores") or recipe.reference is None:
        return None
    return (
        f"the reference gives no number for {line['broken_scores']} tokens of it: a weight of reference.path = "
        f"'{recipe.reference.path}' is broken, or its precision is; name another reference"
    )


def judgement(recipe: Recipe, progress: Progress) -> Hook:
    """At the last step, into its checkpoint: why the run cannot be called done, where it cannot."""

    def judge(moment: Moment) -> None:
        if moment.is_last:
            broken = _broken_end(recipe, progress.meta.skipped or 0, moment.line)
            progress.meta = replace(progress.meta, broken=broken)

    return judge


def _broken_end(recipe: Recipe, skipped: int, line: dict[str, Any]) -> str | None:
    total = recipe.train_steps
    figures = [key for key, value in line.items() if key.startswith("eval/") and not math.isfinite(value)]
    if figures:
        return f"the last evaluation is no number ({', '.join(figures)}): the model is broken"
    if skipped > MAX_SKIPPED_SHARE * total:
        what = "no step updated the model" if skipped == total else f"{skipped} of {total} steps updated nothing"
        allowed = f" (allowed: {MAX_SKIPPED_SHARE:.0%})"
        reference = _broken_reference(recipe, line)
        cause = (
            f": {reference}" if reference else ": log.txt names them; look at their data, or lower optimizer.peak_lr"
        )
        return f"{what}, because the gradient norm was not finite{allowed}{cause}"
    return None
