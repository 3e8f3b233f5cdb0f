"""What training is made of, checked: everything that a mistake could stop comes before the run folder is written to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.config import Recipe
from remit_megatron.data.sources import check_sources
from remit_megatron.fit import num_microbatches
from remit_megatron.mcore.step import ForwardStep
from remit_megatron.objectives import Objective
from remit_megatron.optional import check_optional_parts
from remit_megatron.run.checkpoint import CheckpointFolder, Meta
from remit_megatron.run.fallback import newest_whole
from remit_megatron.run.fit import check_documents
from remit_megatron.run.folder import RunFolder
from remit_megatron.run.models import build_reference, build_student
from remit_megatron.run.prepare import Ready, prepare
from remit_megatron.run.process import Process, from_rank_0
from remit_megatron.run.reference import Reference
from remit_megatron.run.resume import begin_or_resume
from remit_megatron.scores.open import frozen_reference, open_source
from remit_megatron.scores.source import ScoreSource
from remit_megatron.train.held_out import Evaluator
from remit_megatron.train.tokens import TokenRecords, open_records


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """The parts of a run on one rank."""

    ready: Ready
    objective: Objective
    num_microbatches: int
    """That a data-parallel rank has in a step."""
    folder: RunFolder
    checkpoints: CheckpointFolder
    passed_over: dict[Path, str]
    """Damaged checkpoints newer than the one to go on from, with what is wrong with each."""
    meta: Meta
    """Where the run stands."""
    remarks: tuple[str, ...]
    """What to say of how the run goes on."""
    chunks: list[Any]
    """The student's, bare, with its initial weights."""
    config: Any
    """Megatron's, of the student."""
    reference: Reference | None
    """The frozen model, where it may have to run during training."""
    source: ScoreSource | None
    """None for an objective that takes no scores."""
    forward_step: ForwardStep
    evaluator: Evaluator
    records: TokenRecords | None


def set_up(recipe: Recipe, process: Process, say: Callable[[str], None], *, fallback: bool = False) -> SetUp:
    """Check a recipe against everything it names, and build its models. Collective.

    Args:
        say: takes a line for the log, once there is one.
        fallback: go on from the newest checkpoint that is whole, where newer ones are damaged.

    Raises UserError, on every rank alike, for the first thing that is wrong.
    """
    folder = RunFolder(Path(recipe.run), recipe)
    checkpoints = CheckpointFolder(folder.path / "checkpoints", recipe.checkpoint.keep)
    try:
        from_rank_0(lambda: _hold(folder, checkpoints), process.device)
        return _set_up(recipe, process, say, folder, checkpoints, fallback)
    except BaseException:
        folder.release()
        raise


def _hold(folder: RunFolder, checkpoints: CheckpointFolder) -> None:
    """On rank 0: what the run's folder holds is planned with only when nobody else can change it."""
    folder.hold()
    if folder.is_held:
        checkpoints.recover()


def _set_up(
    recipe: Recipe,
    process: Process,
    say: Callable[[str], None],
    folder: RunFolder,
    checkpoints: CheckpointFolder,
    fallback: bool,
) -> SetUp:
    objective = recipe.build_objective()
    whole, passed_over = newest_whole(checkpoints, process.device) if fallback else (None, {})
    ready = prepare(recipe, process, resume=whole)
    count = num_microbatches(recipe, process.world_size)
    check_documents(recipe, ready.data.eod_id, ready.plan.shape.vocab_size)
    check_optional_parts(recipe)
    evaluator = Evaluator(recipe, ready.groups, ready.plan.common_rows, ready.tokenizer)
    check_sources(
        [source.info for source in ready.data.sources],
        {name: held_out.source.info for name, held_out in evaluator.sets.items()},
        recipe.data.eod_id,
    )
    standing = begin_or_resume(ready, evaluator.content)
    evaluator.replaced = standing.replaced
    chunks, config = build_student(recipe, ready.plan, process.device)
    reference = build_reference(recipe, ready.plan, process.device)
    records = open_records(recipe, evaluator.sets, objective, reference, ready.groups, process.device)
    frozen = frozen_reference(ready, reference)
    source = open_source(ready, objective, reference, frozen, say)
    return SetUp(
        ready=ready,
        objective=objective,
        num_microbatches=count,
        folder=folder,
        checkpoints=checkpoints,
        passed_over=passed_over,
        meta=standing.meta,
        remarks=standing.remarks,
        chunks=chunks,
        config=config,
        reference=reference if frozen.chunks else None,
        source=source,
        forward_step=ForwardStep(objective, frozen, ready.groups, recipe.data.sequence_length),
        evaluator=evaluator,
        records=records,
    )
