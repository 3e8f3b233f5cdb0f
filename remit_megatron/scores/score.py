"""`remit score`: the reference's scores of every sample that a recipe needs, made ahead and kept on disk."""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.errors import UserError
from remit_megatron.ops.score_quanta import quantise
from remit_megatron.run.models import build_reference
from remit_megatron.run.prepare import prepare
from remit_megatron.run.process import Process, from_rank_0, joined_process
from remit_megatron.run.watchdog import Watchdog
from remit_megatron.scores.cache import Block, ScoreCache, blocks_of
from remit_megatron.scores.open import open_cache
from remit_megatron.scores.scorer import Scorer, cache_manifest

KEY = "remit score"


def score_recipe(recipe: Recipe, output: str | None, shard: tuple[int, int] = (0, 1), check: int = 0) -> None:
    """Score a recipe's samples into `output` (default: reference.scores), or with `check` compare so many with it.

    shard: (number, of so many): block b belongs to shard b modulo the second. Called on every rank. Resumes: blocks
    that are there and undamaged stay. Raises UserError for a folder with other scores, RunError for a failure. A rank
    that makes no progress is ended by the recipe's [watchdog], for which a block of scores is slow work.
    """
    folder = output or (recipe.reference.scores if recipe.reference else None)
    if recipe.reference is None:
        raise UserError(f"{KEY}: the recipe has no [reference] to score with")
    if folder is None:
        raise UserError(f"{KEY}: say where to, with --output or reference.scores")
    with Watchdog(recipe.watchdog) as watchdog, joined_process(recipe.compute) as process:
        score_on(recipe, Path(folder), process, shard, check, watchdog)


def score_on(
    recipe: Recipe,
    folder: Path,
    process: Process,
    shard: tuple[int, int] = (0, 1),
    check: int = 0,
    watchdog: Watchdog | None = None,
) -> None:
    """`score_recipe` on a process that has joined. Collective."""
    watchdog = watchdog or Watchdog()
    ready = prepare(recipe, process)
    manifest = cache_manifest(ready)
    reference = build_reference(recipe, ready.plan, process.device, load=True)
    assert reference is not None
    scorer = Scorer(ready, reference)
    if check:
        error = scorer.check(open_cache(ready, folder, KEY), check)
        if process.rank == 0:
            print(json.dumps({"samples": check, **error._asdict()}))
        return
    manifest = from_rank_0(lambda: ScoreCache.begin(folder, manifest, KEY).manifest, process.device)
    cache = ScoreCache(folder, manifest, KEY)
    # One rank writes; it is the first of the last stage, whose ranks have the scores.
    writes = ready.groups.counts_loss and ready.groups.dp_cp.rank() == 0
    if not writes:
        _score_blocks(scorer, cache, shard, process, watchdog, writes=False)
        return
    with cache.writing_shard(*shard):
        _score_blocks(scorer, cache, shard, process, watchdog, writes=True)


def _score_blocks(
    scorer: Scorer, cache: ScoreCache, shard: tuple[int, int], process: Process, watchdog: Watchdog, *, writes: bool
) -> None:
    number, shards = shard
    mine = blocks_of(cache.manifest)[number::shards]
    todo: list[Block] = from_rank_0(lambda: [block for block in mine if not cache.is_whole(block)], process.device)
    started, done = time.monotonic(), 0
    # Blocks of long samples with their distributions hold fewer than all ranks score together.
    together = max(1, scorer.round_samples // cache.manifest.block_samples)
    for start in range(0, len(todo), together):
        some = todo[start : start + together]
        with watchdog.slow("a block of scores"):
            scored = scorer.score([(block.source, block.first + i) for block in some for i in range(block.samples)])
            first = 0
            for block in some if writes else ():
                rows = slice(first, first + block.samples)
                planes = None if scored.planes is None else scored.planes[:, rows].numpy()
                cache.write_block(block, quantise(scored.nll[rows]).numpy(), scored.mask[rows].numpy(), planes)
                first, done = rows.stop, done + block.samples
                _say_progress(cache, todo, done, time.monotonic() - started)
    dist.barrier()
    if writes:
        missing = len(cache.missing())
        print(
            f"{cache.folder}: {'complete' if not missing else f'{missing} blocks of other shards to come'}, "
            f"{cache.saturated_share():.4%} of the tokens saturated",
            file=sys.stderr,
            flush=True,
        )
        if remark := cache.remark():
            print(remark, file=sys.stderr, flush=True)
    from_rank_0(cache.check_saturation, process.device)


def _say_progress(cache: ScoreCache, todo: list[Block], done: int, elapsed_s: float) -> None:
    total = sum(block.samples for block in todo)
    rate = done * cache.manifest.sequence_length / max(elapsed_s, 1e-9)
    left_min = elapsed_s * (total - done) / done / 60
    print(
        f"{cache.folder}: {done:,} of {total:,} samples, {rate:,.0f} tokens/s, {left_min:.1f} min left",
        file=sys.stderr,
        flush=True,
    )
