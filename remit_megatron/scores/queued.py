"""The run's side of asynchronous scoring: each step's scores from a scorer's queue, or the word to score online."""

import contextlib
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import locked, make_folder
from remit_megatron.errors import RunError, UserError
from remit_megatron.mcore.datasets import TrainingData
from remit_megatron.mcore.groups import Groups
from remit_megatron.ops.score_steps import round_to_steps
from remit_megatron.run.process import from_rank_0
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.queue import KEY, RUN_LOCK, QueueManifest, RunSide

Batch = dict[str, torch.Tensor]
POLL_S = 0.02
WAIT = "wait"
ROUND_S = 5.0
"""Rank 0 tells the others so often that it still waits, so that no collective of theirs times out."""


def queue_manifest(recipe: Recipe, scores: CacheManifest) -> QueueManifest:
    """What the steps' scores of a recipe are."""
    return QueueManifest(
        scores=scores,
        weights=tuple(source.weight for source in recipe.data.train),
        step_samples=recipe.global_batch_samples,
        train_steps=recipe.train_steps,
    )


class QueuedScores:
    """Rank 0 alone reads the folder, and sends a step's scores to all: no other host's view of it counts."""

    def __init__(
        self,
        recipe: Recipe,
        manifest: CacheManifest,
        data: TrainingData,
        groups: Groups,
        device: torch.device,
        say: Callable[[str], None],
    ):
        assert recipe.reference is not None
        assert recipe.reference.queue is not None
        self.recipe = recipe
        self.settings = recipe.reference.queue
        self.rounds = recipe.reference.rounds
        self.data = data
        self.groups = groups
        self.device = device
        self.wait_ms = 0.0
        """How long the last step's scores were waited for."""
        self.online = False
        """Whether the last step had to be scored online."""
        self._say = say
        self._held = contextlib.ExitStack()
        from_rank_0(self._claim, device)
        self._side = RunSide(recipe.queue_folder, queue_manifest(recipe, manifest), self.settings.timeout_s)
        self._found: torch.Tensor | None = None
        self._waited = False

    def _claim(self) -> None:
        folder = self.recipe.queue_folder
        make_folder(folder, KEY)
        busy = f"{KEY}: another run uses {folder}: a scorer serves one at a time: set another reference.queue.folder"
        try:
            self._held.enter_context(locked(folder / RUN_LOCK, busy=busy))
        except UserError:
            time.sleep(1.0)  # a scorer that starts may just be looking whether anybody holds it
            self._held.enter_context(locked(folder / RUN_LOCK, busy=busy))

    def close(self) -> None:
        """Let another run use the folder."""
        self._held.close()

    def publish(self, step: int, *, done: bool = False) -> None:
        """Tell the scorer which step is needed next. Collective."""
        from_rank_0(lambda: self._side.publish(step, done=done), self.device)

    def skip(self, step: int) -> None:
        """A step's scores come from elsewhere: the scorer is told to go on. Collective."""
        self.wait_ms, self.online = 0.0, False
        self.publish(step + 1)

    def read(self, step: int, batches: list[Batch]) -> bool:
        """Put the scores of a step's samples into its batches; False where the step is to be scored online. Collective.

        Raises RunError where there is no scorer and the recipe says to stop.
        """
        started, waited = time.perf_counter(), False
        while (reason := from_rank_0(lambda: self._look(step, started), self.device)) == WAIT:
            waited = True
        self.wait_ms = (time.perf_counter() - started) * 1e3 if waited or self._waited else 0.0
        self._tell(step, reason)
        if self.online:
            return False
        self._fill(batches)
        return True

    def _look(self, step: int, started: float) -> str | None:
        """On rank 0: None with the scores in `_found`, WAIT, or the reason to do without. Takes ROUND_S at most."""
        count = self.recipe.global_batch_samples
        samples = [self.data.order[n] for n in range((step - 1) * count, step * count)]
        deadline = time.perf_counter() + ROUND_S
        self._waited = False
        while True:
            look = self._side.look(step, samples)
            if look.scores is not None or (look.reason and self.settings.fallback == "online"):
                self._found = None if look.scores is None else torch.from_numpy(look.scores.copy())
                # Needed from now on is the next one; a scorer need not begin with a step that is scored here.
                self._side.publish(step + 1)
                return look.reason
            if not look.wait and time.perf_counter() - started > self.settings.timeout_s:
                raise RunError(
                    f"{KEY}: step {step} has no scores: {look.reason}, and fallback = 'stop' after "
                    f"{self.settings.timeout_s:g} s: start `remit score RECIPE --follow`, then the run again, or set "
                    "reference.queue.fallback = 'online'"
                )
            if time.perf_counter() > deadline:
                return WAIT
            self._waited = True
            time.sleep(POLL_S)

    def _tell(self, step: int, reason: str | None) -> None:
        """Say once that a state has changed."""
        online = reason is not None
        if online != self.online:
            back = f"step {step}: a scorer is at work: its scores are used again"
            self._say(f"step {step}: {reason}: scores are made online until a scorer comes" if online else back)
        self.online = online

    def _fill(self, batches: list[Batch]) -> None:
        shape = (self.recipe.global_batch_samples, self.recipe.data.sequence_length)
        scores = self._found if self._found is not None else torch.empty(shape)
        scores = scores.to(self.device)
        dist.broadcast(scores, src=0)
        self._found = None
        if self.rounds:
            scores = round_to_steps(scores)
        dp, size = self.groups.dp, self.recipe.batch.microbatch_samples
        for i, batch in enumerate(batches):
            first = (i * dp.size() + dp.rank()) * size
            batch["ref_nll"] = scores[first : first + size]
