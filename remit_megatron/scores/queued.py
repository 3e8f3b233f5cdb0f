"""Scores made beside the run: each step's come from a scorer's queue, or are made online where there is no scorer."""

import contextlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import locked, make_folder
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.errors import RunError, UserError
from remit_megatron.ops.score_quanta import round_to_quanta
from remit_megatron.run.prepare import Ready
from remit_megatron.run.process import from_rank_0
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.queue import KEY, RUN_LOCK, Look, QueueManifest, RunSide
from remit_megatron.scores.record import from_planes, queued_row, unpack_planes
from remit_megatron.scores.source import Filled, ScoreSource

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


class Queued:
    """Rank 0 alone reads the folder, and sends a step's scores to all: no other host's view of it counts."""

    def __init__(
        self, ready: Ready, manifest: CacheManifest, otherwise: ScoreSource | None, say: Callable[[str], None]
    ):
        """Nothing is written before the first `want`.

        otherwise: fills the steps that have to do without a scorer; None: the run stops at the first of them.
        """
        reference = ready.recipe.reference
        assert reference is not None
        assert reference.queue is not None
        self._recipe = ready.recipe
        self._timeout_s = reference.queue.timeout_s
        self._rounds = reference.rounds
        self._order = ready.data.order
        self._deal = ready.deal
        self._is_last_stage = ready.groups.is_last_stage
        self._device = ready.process.device
        self._otherwise = otherwise
        self._is_without = False
        """Whether the step before had to do without a scorer."""
        self._say = say
        self._held = contextlib.ExitStack()
        self._is_held = False
        """Of rank 0."""
        self._refused: str | None = None
        """Why the scorer could not be told last which step is needed."""
        self._side = RunSide(self._recipe.queue_folder, queue_manifest(self._recipe, manifest), self._timeout_s)
        self._row = queued_row(manifest)
        self._found: np.ndarray | None = None
        self._waited = False

    def want(self, step: int, *, done: bool = False) -> None:
        """Tell the scorer which step is needed next. The first time, the folder becomes this run's.

        Raises UserError where another run uses it, RunError where it cannot be written and the recipe says to stop.
        """
        self._is_without = False
        from_rank_0(lambda: self._publish(step, done=done), self._device)

    def _publish(self, step: int, *, done: bool = False) -> None:
        """On rank 0. A disk that refuses it costs a run that can do without a scorer nothing but the scorer."""
        try:
            if not self._is_held:
                self._claim()
                self._is_held = True
            self._side.publish(step, done=done)
            self._refused = None
        except RunError as error:
            if self._otherwise is None:
                raise
            self._refused = str(error)

    def _claim(self) -> None:
        folder = self._recipe.queue_folder
        make_folder(folder, KEY)
        busy = f"{KEY}: another run uses {folder}: a scorer serves one at a time: set another reference.queue.folder"
        try:
            self._held.enter_context(locked(folder / RUN_LOCK, busy=busy))
        except UserError:
            time.sleep(1.0)  # a scorer that starts may just be looking whether anybody holds it
            self._held.enter_context(locked(folder / RUN_LOCK, busy=busy))

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        """Raises RunError where there is no scorer and the recipe says to stop."""
        started, waited = time.perf_counter(), False
        while (reason := from_rank_0(lambda: self._look(step, started), self._device)) == WAIT:
            waited = True
        waited_ms = (time.perf_counter() - started) * 1e3 if waited or self._waited else 0.0
        self._tell(step, reason)
        if reason is None:
            return Filled(microbatches=self._filled(microbatches), ran_reference=False, waited_ms=waited_ms)
        assert self._otherwise is not None
        filled = self._otherwise.fill(step, microbatches)
        return Filled(microbatches=filled.microbatches, ran_reference=filled.ran_reference, waited_ms=waited_ms)

    def _look(self, step: int, started: float) -> str | None:
        """On rank 0: None with the scores in `_found`, WAIT, or the reason to do without. Takes ROUND_S at most."""
        count = self._recipe.global_batch_samples
        samples = [self._order[n] for n in range((step - 1) * count, step * count)]
        deadline = time.perf_counter() + ROUND_S
        self._waited = False
        while True:
            look = self._side.look(step, samples)
            if self._refused and look.scores is None:  # it would be waited for without end
                look = Look(reason=self._refused)
            if look.scores is not None or (look.reason and self._otherwise):
                self._found = look.scores
                # Needed from here on is the next one; a scorer need not begin with a step that is scored here.
                self._publish(step + 1)
                return look.reason
            if not look.wait and time.perf_counter() - started > self._timeout_s:
                raise RunError(
                    f"{KEY}: step {step} has no scores: {look.reason}, and fallback = 'stop' after "
                    f"{self._timeout_s:g} s: start `remit score RECIPE --follow`, then the run again, or set "
                    "reference.queue.fallback = 'online'"
                )
            if time.perf_counter() > deadline:
                return WAIT
            self._waited = True
            time.sleep(POLL_S)

    def _tell(self, step: int, reason: str | None) -> None:
        """Say once that a state has changed."""
        is_without = reason is not None
        if is_without != self._is_without:
            back = f"step {step}: a scorer is at work: its scores are used again"
            self._say(f"step {step}: {reason}: scores are made online until a scorer comes" if is_without else back)
        self._is_without = is_without

    def _filled(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """From what rank 0 has found: all ranks' samples of one microbatch after the other, of which each rank takes
        its own."""
        count, filled = self._recipe.global_batch_samples, []
        size = self._deal.turn_samples
        turns: list[np.ndarray | None] = [None] * (count // size)
        if self._found is not None:
            found = np.ascontiguousarray(self._found).view(np.uint8).reshape(count, self._row.itemsize)
            turns = list(found.copy().reshape(-1, size, self._row.itemsize))
        self._found = None
        for i, (turn, microbatch) in enumerate(zip(turns, microbatches, strict=True)):
            shape = (size, self._row.itemsize)
            content = torch.empty(shape, dtype=torch.uint8) if turn is None else torch.from_numpy(turn)
            content = content.to(self._device)
            dist.broadcast(content, src=0)
            mine = self._deal.rows(i)
            rows = content[mine.start - i * size : mine.stop - i * size]
            filled.append(microbatch.with_scores(self._scores(rows, microbatch)) if self._is_last_stage else microbatch)
        return filled

    def _scores(self, rows: torch.Tensor, microbatch: Microbatch) -> Scores:
        """Of this rank's positions. rows: [b, bytes] uint8."""
        records = rows.cpu().numpy().reshape(-1).view(self._row.base).reshape(len(rows), *self._row.shape)
        is_kept = records.dtype.names is not None
        nll = torch.from_numpy(np.ascontiguousarray(records["nll"] if is_kept else records))
        ref_nll = self._deal.cut(nll).to(self._device)
        if self._rounds:
            ref_nll = round_to_quanta(ref_nll)
        if not is_kept:
            return Scores(ref_nll=ref_nll)
        planes = torch.stack([self._deal.cut(plane) for plane in unpack_planes(records)]).to(self._device)
        return from_planes(planes, self._deal.cut(microbatch.labels), ref_nll)

    def close(self) -> None:
        """Let another run use the folder."""
        self._held.close()
        if self._otherwise is not None:
            self._otherwise.close()
