"""Which source a run's scores come from, as its recipe says, checked before the run begins."""

from collections.abc import Callable
from pathlib import Path

from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.teacher import FrozenReference
from remit_megatron.objectives import Objective
from remit_megatron.run.prepare import Ready
from remit_megatron.run.process import from_rank_0
from remit_megatron.run.reference import Reference
from remit_megatron.scores.cache import ScoreCache
from remit_megatron.scores.cached import Cached
from remit_megatron.scores.kept import Kept
from remit_megatron.scores.online import Online
from remit_megatron.scores.queued import Queued
from remit_megatron.scores.scorer import Scorer, cache_manifest
from remit_megatron.scores.source import ScoreSource


def open_source(
    ready: Ready,
    objective: Objective,
    reference: Reference | None,
    frozen: FrozenReference,
    say: Callable[[str], None],
) -> ScoreSource | None:
    """The recipe's source of scores; None for an objective that needs none. Collective.

    Args:
        reference: loaded, where the recipe asks for it. For scores made ahead it is compared with them here, and not
            needed afterwards.
        frozen: the same, as a step runs it.
        say: takes a line for the log, where the source has something to tell during the run.

    Raises UserError for scores on disk that are not those of this recipe. Nothing of the run's folder is written.
    """
    settings = ready.recipe.reference
    if settings is None:
        return None
    manifest = cache_manifest(ready)
    if settings.scores is not None:
        cache = open_cache(ready, Path(settings.scores), "reference.scores")
        if reference is not None:
            Scorer(ready, reference).check(cache, settings.check_samples)
        return Cached(cache, ready.groups, ready.process.device, distribution=settings.distribution > 0)
    source: ScoreSource | None = Online(frozen, objective) if reference is not None else None
    if settings.queue is not None:
        source = Queued(ready, manifest, source, say)
    assert source is not None, "build_reference loads the model wherever nobody else makes the scores"
    return Kept(source, ready, manifest) if settings.write_scores is not None else source


def frozen_reference(ready: Ready, reference: Reference | None) -> FrozenReference:
    """The reference as a step runs it, with the recipe's settings; without chunks where it has nothing to run for."""
    settings = ready.recipe.reference
    if settings is None:
        return FrozenReference(chunks=[], groups=ready.groups)
    runs = reference is not None and settings.scores is None
    return FrozenReference(
        chunks=reference.chunks if reference is not None and runs else [],
        groups=ready.groups,
        merge_microbatches=settings.merge_microbatches,
        round_scores=settings.rounds,
        common_vocab=ready.plan.common_rows,
        graph=Replayed() if settings.cuda_graph else None,
        top_k=settings.distribution,
    )


def open_cache(ready: Ready, folder: Path, key: str) -> ScoreCache:
    """Scores on disk for this recipe's samples, verified by rank 0. Collective.

    key: recipe key or flag that named the folder. Raises UserError, on every rank alike, for a cache that does not fit.
    """
    manifest = cache_manifest(ready)
    from_rank_0(lambda: ScoreCache.open(folder, manifest, key) and None, ready.process.device)
    return ScoreCache.open(folder, manifest, key, verify=False)
