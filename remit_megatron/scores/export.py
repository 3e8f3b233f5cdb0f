"""`remit score RECIPE --export DIR`: scores in the order of a dataset's tokens, as `remit data select` reads them."""

import json
from pathlib import Path

import numpy as np

from remit_megatron.config import Recipe
from remit_megatron.data.files import make_folder, write_atomically, writing
from remit_megatron.device import resolve_device
from remit_megatron.errors import UserError
from remit_megatron.mcore.datasets import SourceSamples
from remit_megatron.run.build_plan import make_build_plan
from remit_megatron.run.sources import open_training
from remit_megatron.scores.cache import ScoreCache
from remit_megatron.scores.scorer import manifest_of


def export_scores(recipe: Recipe, scores: str | None, folder: str) -> list[Path]:
    """Write NAME.npy, float32 [tokens of .bin] in nats, NaN where not scored, for each source of the recipe; and
    NAME.npy.json with the dataset's fingerprint. NAME is that of the source's prefix. Starts no rank, loads no model.

    scores: the cache's folder; default: reference.scores. Raises UserError for a cache that does not fit.
    """
    if recipe.reference is None or (scores or recipe.reference.scores) is None:
        raise UserError("remit score --export: say where the scores are, with --output or reference.scores")
    plan = make_build_plan(recipe, resolve_device(recipe.compute.device))
    data, tokenizer = open_training(recipe, plan)
    names = [Path(source.path).name for source in recipe.data.train]
    if len(set(names)) < len(names):
        raise UserError(f"remit score --export: two sources have one name ({', '.join(names)}): export them apart")
    manifest = manifest_of(recipe, plan, data, tokenizer)
    cache = ScoreCache.open(Path(scores or recipe.reference.scores or ""), manifest, "--export")
    make_folder(Path(folder), "remit score --export")
    written = []
    for number, (name, source, count) in enumerate(zip(names, data.sources, data.order.needed(), strict=True)):
        path = Path(folder) / f"{name}.npy"
        with writing(path):
            np.save(path, _by_token(cache, number, source, count))
        write_atomically(Path(f"{path}.json"), json.dumps({"fingerprint": source.info.fingerprint}).encode())
        written.append(path)
    return written


def _by_token(cache: ScoreCache, number: int, source: SourceSamples, samples: int) -> np.ndarray:
    """[tokens of .bin] float32. The first token of a sample is predicted in the sample before it, or never."""
    found = np.full(source.info.num_tokens, np.nan, dtype=np.float32)
    for sample in range(samples):
        found[source.packed.places(sample)[1:]] = cache.scores(number, sample)
    return found
