"""`remit score RECIPE --follow`: a scorer of its own that runs ahead of a run and leaves it each step's scores."""

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import locked, make_folder
from remit_megatron.errors import UserError
from remit_megatron.run.models import build_reference
from remit_megatron.run.prepare import prepare
from remit_megatron.run.process import Process, StopSignals, from_rank_0, joined_process
from remit_megatron.run.watchdog import Watchdog
from remit_megatron.scores.queue import KEY, ScorerSide, clear_scores, write_step
from remit_megatron.scores.queued import queue_manifest
from remit_megatron.scores.record import pack_rows, queued_row
from remit_megatron.scores.scorer import SampleNumber, Scorer, cache_manifest

IDLE_S = 0.05
ROUNDS_A_PIECE = 4
"""The counter that shows life moves after so many rounds of microbatches, however large a step is."""


def follow_run(recipe: Recipe) -> None:
    """Score until the run is done, or a signal asks to stop. Called on every rank of the scorer.

    Raises UserError where the run needs other scores than this recipe's, or another scorer follows it. A rank that
    hangs is ended by the recipe's [watchdog]; to wait for the run is no hang.
    """
    if recipe.reference is None or recipe.reference.queue is None:
        raise UserError("remit score --follow: the recipe has no [reference.queue]; an empty one will do")
    watchdog = Watchdog(recipe.watchdog)
    with StopSignals() as signals, watchdog, joined_process(recipe.compute) as process:
        follow_on(recipe.for_scorer(), process, lambda: signals.requested, watchdog)


def follow_on(
    recipe: Recipe, process: Process, stop: Callable[[], bool] = lambda: False, watchdog: Watchdog | None = None
) -> None:
    """`follow_run` on a process that has joined; the recipe has the scorer's layout. Collective."""
    assert recipe.reference is not None
    assert recipe.reference.queue is not None
    device, folder = process.device, recipe.queue_folder
    if from_rank_0(lambda: _is_over(recipe), device):
        from_rank_0(lambda: _clear(folder), device)
        _say(process, f"{recipe.run}: the run is done: there is nothing to score")
        return
    ready = prepare(recipe, process)
    manifest = queue_manifest(recipe, cache_manifest(ready))
    with contextlib.ExitStack() as held:
        from_rank_0(lambda: _lock(folder, held), device)
        reference = build_reference(recipe, ready.plan, device, load=True)
        assert reference is not None
        scorer, ahead = Scorer(ready, reference), recipe.reference.queue.ahead_steps
        side = from_rank_0(lambda: ScorerSide(folder, manifest, ahead), device)
        try:
            _follow(scorer, side, process, stop, watchdog or Watchdog())
        finally:
            if process.rank == 0:
                side.beat(ended=True)


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    make_folder(folder, KEY)
    held.enter_context(locked(folder / ".scorer.lock", busy=f"{KEY}: another scorer follows the run of {folder}"))


def _clear(folder: Path) -> None:
    """What a scorer that was killed has left of a run that came to its end without it."""
    if folder.is_dir():
        with contextlib.ExitStack() as held:
            _lock(folder, held)
            clear_scores(folder)


def _follow(scorer: Scorer, side: ScorerSide, process: Process, stop: Callable[[], bool], watchdog: Watchdog) -> None:
    """side: each rank has one; only rank 0's reads, beats and removes."""
    groups, recipe = scorer.groups, scorer.ready.recipe
    count, order = recipe.global_batch_samples, scorer.ready.data.order
    # One rank has all scores and writes; it is the first of the last stage.
    writes, started = groups.counts_loss and groups.dp_cp.rank() == 0, None
    _say(process, f"{side.folder}: scores for {recipe.run} when it comes")
    while True:
        step, done = from_rank_0(lambda: (None, True) if stop() else _next(side, recipe), process.device)
        watchdog.stepped(0 if step is None else step - 1)
        if done:
            _say(process, f"{side.folder}: the scorer ends: " + ("it was asked to" if stop() else "the run is done"))
            return
        if step is None:
            time.sleep(IDLE_S)
            continue
        if started is None:
            started = time.monotonic()
            _say(process, f"{side.folder}: the run is there: scores from step {step} on")
        samples = [order[n] for n in range((step - 1) * count, step * count)]
        scores = _score(scorer, samples, side, process, partial(watchdog.stepped, step - 1))
        if writes:
            write_step(side.folder, step, side.manifest, samples, scores)
        dist.barrier()
        if process.rank == 0:
            side.announce(step)


def _next(side: ScorerSide, recipe: Recipe) -> tuple[int | None, bool]:
    """`side.next()`; done as well where the run has ended while this scorer started."""
    step, done = side.next()
    return step, done or (step is None and _is_over(recipe))


def _is_over(recipe: Recipe) -> bool:
    return (Path(recipe.run) / "DONE").exists()


def _score(
    scorer: Scorer, samples: list[SampleNumber], side: ScorerSide, process: Process, moved: Callable[[], None]
) -> np.ndarray:
    """As `write_step` takes them, on the writing rank. Piece by piece, so that a large step shows that it moves."""
    size, pieces, row = scorer.round_samples * ROUNDS_A_PIECE, [], queued_row(side.manifest.scores)
    for first in range(0, len(samples), size):
        found = scorer.score(samples[first : first + size])
        planes = None if found.planes is None else found.planes.numpy()
        pieces.append(pack_rows(row, found.nll.numpy(), planes))
        moved()
        if process.rank == 0:
            side.beat()
    return np.concatenate(pieces)


def _say(process: Process, text: str) -> None:
    if process.rank == 0:
        print(text, file=sys.stderr, flush=True)
