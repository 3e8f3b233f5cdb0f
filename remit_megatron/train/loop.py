"""The training loop: a step, and hooks after it."""

from collections.abc import Sequence
from pathlib import Path

from remit_megatron.config import Recipe
from remit_megatron.data.loader import make_loader
from remit_megatron.data.steps import BatchPlan, Loader
from remit_megatron.errors import DamagedError, RunError, StopRequested
from remit_megatron.run.process import Process, StopSignals, from_rank_0, joined_process
from remit_megatron.run.status import Status
from remit_megatron.run.watchdog import Watchdog
from remit_megatron.train.announce import precision_lines, start_lines
from remit_megatron.train.hooks import Hook, Moment, evaluation, every, judgement, refusal_of_divergence, token_records
from remit_megatron.train.outputs import Outputs
from remit_megatron.train.saver import Saver
from remit_megatron.train.setup import SetUp, set_up
from remit_megatron.train.step import Progress, TrainStep
from remit_megatron.train.student import Student


def train(recipe: Recipe, *, fallback: bool = False) -> None:
    """Run a recipe to its end, from its newest checkpoint where it has one. Called on every rank.

    fallback: where the newest one is damaged, go on from the newest whole one.

    Raises UserError for a mistake in recipe or input (nothing is written then), RunError for a failure,
    StopRequested after a signal, when the checkpoint is complete; HangError where ranks do not answer.
    """
    status = Status(Path(recipe.run))
    watchdog = Watchdog(recipe.watchdog, status)
    with StopSignals() as signals, watchdog, status.outcome(), joined_process(recipe.compute) as process:
        trainer = start(recipe, process, status, watchdog, fallback=fallback)
        try:
            trainer.run(signals)
        finally:
            trainer.close()


def start(
    recipe: Recipe,
    process: Process,
    status: Status | None = None,
    watchdog: Watchdog | None = None,
    *,
    fallback: bool = False,
) -> "Trainer":
    """Set a run up, and claim its folder. Collective; see `train` for what is raised."""
    outputs, watchdog = Outputs(status or Status(Path(recipe.run))), watchdog or Watchdog()
    parts = set_up(recipe, process, outputs.say, fallback=fallback)
    try:
        return _start(parts, outputs, watchdog)
    except BaseException:
        parts.folder.release()
        raise


def _start(parts: SetUp, outputs: Outputs, watchdog: Watchdog) -> "Trainer":
    """Everything that a mistake could stop is behind us: from here on the run folder is written to."""
    recipe, process = parts.ready.recipe, parts.ready.process
    _claim(parts, outputs)
    student, progress = _student(parts), Progress(parts.meta)
    loader = _loader(parts)
    saver = Saver(
        parts.folder,
        parts.checkpoints,
        student,
        parts.reference,
        outputs,
        progress,
        process,
        watchdog,
        asynchronous=recipe.checkpoint.asynchronous,
    )
    from_rank_0(lambda: _open_outputs(parts, outputs), process.device)
    step = TrainStep(parts.ready, student, parts.forward_step, parts.source, loader, progress)
    if parts.source:
        parts.source.want(parts.meta.step + 1)
    if parts.reference:
        for text in precision_lines(parts, student):
            outputs.say(text)

    def keeps(moment: Moment) -> bool:
        return recipe.keeps_checkpoint(moment.line["tokens"])

    hooks: list[Hook] = [
        every(recipe.evaluation.every_steps, evaluation(student, parts.evaluator, watchdog, process.device)),
        *_recording(parts, student),
        outputs.write,
        judgement(recipe, progress),
        refusal_of_divergence(recipe, progress, outputs.say),
        saver.poll,
        every(recipe.checkpoint.every_steps, saver.after, at_stop=True, also=keeps),
    ]
    return Trainer(parts, step, hooks, loader, saver, outputs, watchdog)


class Trainer:
    """A run on one rank, from where it stands to its end."""

    def __init__(
        self,
        parts: SetUp,
        step: TrainStep,
        hooks: Sequence[Hook],
        loader: Loader,
        saver: Saver,
        outputs: Outputs,
        watchdog: Watchdog,
    ):
        self.parts = parts
        self.step = step
        self.hooks = hooks
        self.loader = loader
        self.saver = saver
        self.outputs = outputs
        self.watchdog = watchdog

    def run(self, signals: StopSignals) -> None:
        """Train to the last step, or until a signal asks to stop."""
        recipe, progress = self.parts.ready.recipe, self.step.progress
        total = recipe.train_steps
        for step in range(progress.meta.step + 1, total + 1):
            line, stop = self.step(step, asked_to_stop=signals.requested)
            self.watchdog.stepped(step)
            moment = Moment(step=step, line=line, is_last=step == total, is_stop=stop)
            for hook in self.hooks:
                hook(moment)
            if stop and step < total:
                raise StopRequested(f"{recipe.run}: stopped on request after step {step}; start it again to go on")
        if self.parts.source:
            self.parts.source.want(total + 1, done=True)
        self.watchdog.ending()
        if progress.meta.broken:
            raise RunError(f"{recipe.run}: not done, though its last checkpoint is complete: {progress.meta.broken}")
        from_rank_0(lambda: self._done(total), self.parts.ready.process.device)
        self.outputs.say(f"{recipe.run}: done, {progress.meta.tokens:,} tokens")

    def _done(self, step: int) -> None:
        self.parts.folder.check_in_place()
        self.outputs.status.done(step)

    def close(self) -> None:
        """End threads, and let go of files and locks."""
        self.loader.close()
        if self.parts.source:
            self.parts.source.close()
        self.outputs.close()
        self.parts.folder.release()


def _claim(parts: SetUp, outputs: Outputs) -> None:
    """Make the folder this run's, if it is not yet. Raises UserError where another process has it."""
    ready, resume = parts.ready, parts.ready.plan.resume
    from_rank_0(parts.folder.claim, ready.process.device)
    outputs.status.claimed()
    if resume and parts.passed_over:
        from_rank_0(lambda: parts.checkpoints.pass_over(list(parts.passed_over), resume), ready.process.device)
    if ready.process.rank == 0:
        outputs.status.open(ready.recipe.train_steps, parts.meta if resume else None)


def _student(parts: SetUp) -> Student:
    """With the state that the run goes on from. Raises DamagedError."""
    recipe, plan = parts.ready.recipe, parts.ready.plan
    student = Student(recipe, parts.chunks, parts.config, plan.precision)
    if plan.resume:
        try:
            student.load(plan.resume)
        except DamagedError as error:
            raise parts.checkpoints.refusal(plan.resume, error) from None
    student.advance(parts.meta.tokens)
    return student


def _loader(parts: SetUp) -> Loader:
    """It begins with the step after the one that the run stands at."""
    recipe = parts.ready.recipe
    return make_loader(
        recipe.data.loader,
        parts.ready.data.sample,
        BatchPlan(
            first_sample=parts.meta.step * recipe.global_batch_samples,
            num_steps=recipe.train_steps - parts.meta.step,
            num_microbatches=parts.num_microbatches,
            deal=parts.ready.deal,
        ),
        device=parts.ready.process.device,
        prefetch_steps=recipe.data.prefetch_steps,
    )


def _open_outputs(parts: SetUp, outputs: Outputs) -> None:
    """On rank 0."""
    if parts.records:
        parts.records.resume(parts.meta.step)
    outputs.open(parts.folder, parts.ready.recipe, parts.meta, start_lines(parts))


def _recording(parts: SetUp, student: Student) -> list[Hook]:
    if parts.records is None:
        return []
    return [every(parts.ready.recipe.logging.tokens_every_steps, token_records(student, parts.records))]
