"""Sources of scores without a model: each rank gets its own part of the right samples, and what is kept is that."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.config import Parallel, Recipe, parse_recipe
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.scores import cache
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.source import Filled
from tests.mcore.harness import STUDENT
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, VOCAB, make_data, remit

LAYOUTS = {"cp2": {"context": 2}, "dp2": {}, "pp2": {"pipeline": 2}}
STEPS = 3


def quanta_of(source: int, number: int) -> np.ndarray:
    """The score of every position of a sample, [s]: another number everywhere."""
    return (number * SEQUENCE + np.arange(SEQUENCE)) * 7 % 60000 + source


class Spoken:
    """A source of numbers that are known, which notes what it is asked."""

    def __init__(self, ready: Any):
        self.ready = ready
        self.filled: list[int] = []
        self.wanted: list[Any] = []

    def want(self, step: int, *, done: bool = False) -> None:
        self.wanted.append(step)

    def fill(self, step: int, microbatches: Sequence[Microbatch]) -> Filled:
        self.filled.append(step)
        if not self.ready.groups.is_last_stage:
            return Filled(microbatches=list(microbatches), ran_reference=True)
        scored = [one.with_scores(Scores(ref_nll=expected(one, self.ready))) for one in microbatches]
        return Filled(microbatches=scored, ran_reference=True)

    def close(self) -> None:
        self.wanted.append("closed")


def expected(microbatch: Microbatch, ready: Any) -> torch.Tensor:
    """[b, s/cp] float32, in plain arithmetic: chunk r and chunk 2c - 1 - r of the 2c of a sample."""
    rows = [quanta_of(int(i) >> 40, int(i) & ((1 << 40) - 1)) / 2048 for i in microbatch.sample_id]
    chunks = np.split(np.stack(rows), 2 * ready.groups.cp.size(), axis=1)
    rank, size = ready.groups.cp.rank(), ready.groups.cp.size()
    mine = np.concatenate([chunks[rank], chunks[2 * size - 1 - rank]], axis=1) if size > 1 else np.stack(rows)
    return torch.from_numpy(mine.astype(np.float32))


def on_rank(rank: int, folder: str) -> dict[str, list[str]]:
    """What is wrong, by layout."""
    from remit_megatron.mcore.groups import destroy_groups, initialize_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process

    activate("cpu")
    cache.BLOCK_BYTES = 5 * 2 * SEQUENCE  # five samples, so that blocks and steps do not end together
    process = Process(rank=rank, world_size=2, local_rank=rank, local_world_size=2, device=torch.device("cpu"))
    found = {}
    for name, layout in LAYOUTS.items():
        recipe = parse_recipe(
            remit(
                Path(folder),
                f"sources {name}",
                parallel=layout,
                reference={"path": "none", "write_scores": f"{folder}/kept {name}"},
                schedule={"train_tokens": STEPS * SEQUENCE * SAMPLES, "warmup_tokens": 0},
            )
        )
        groups = initialize_groups(Parallel(**layout), seed=1)
        found[name] = check_sources(recipe, groups, process)
        destroy_groups()
    return found


def check_sources(recipe: Recipe, groups: Any, process: Any) -> list[str]:
    """Kept around `Spoken`, then again, and Cached: in each step, this rank's part of the known numbers."""
    from remit_megatron.mcore import datasets
    from remit_megatron.run.build_plan import BuildPlan
    from remit_megatron.run.prepare import Ready
    from remit_megatron.run.sources import open_training
    from remit_megatron.scores.cached import Cached
    from remit_megatron.scores.kept import Kept
    from remit_megatron.scores.open import open_cache
    from remit_megatron.scores.scorer import cache_manifest

    known = {"shape": STUDENT, "common_rows": VOCAB, "precision": "fp32", "reference_identity": "known"}
    fields: Any = {field.name: known.get(field.name) for field in dataclasses.fields(BuildPlan)}
    plan = BuildPlan(**fields)
    data, tokenizer = open_training(recipe, plan)
    ready = Ready(recipe=recipe, process=process, plan=plan, groups=groups, tokenizer=tokenizer, training=data)
    count = SAMPLES // ready.deal.turn_samples
    steps = {n: datasets.microbatches(data, (n - 1) * SAMPLES, count, ready.deal) for n in range(1, STEPS + 1)}
    inner, problems = Spoken(ready), []

    def check(what: str, filled: Filled, *, ran: bool) -> None:
        if filled.ran_reference != ran:
            problems.append(f"{what}: ran_reference is {filled.ran_reference}")
        for one in filled.microbatches:
            if (one.scores is not None) != groups.is_last_stage:
                problems.append(f"{what}: {one.scores}")
            elif one.scores is not None and not torch.equal(one.scores.ref_nll, expected(one, ready)):
                problems.append(f"{what}: {one.scores.ref_nll} in place of {expected(one, ready)}")

    kept = Kept(inner, ready, cache_manifest(ready))
    for step, microbatches in steps.items():
        check(f"kept {step}", kept.fill(step, microbatches), ran=True)
    dist.barrier()
    again = Kept(inner, ready, cache_manifest(ready))
    for step, microbatches in steps.items():
        check(f"read {step}", again.fill(step, microbatches), ran=False)
    again.close()
    if (inner.filled, inner.wanted) != ([1, 2, 3], [2, 3, 4, "closed"]):
        problems.append(f"the inner source was asked {inner.filled}, {inner.wanted}")
    source = Cached(open_cache(ready, Path(f"{recipe.reference.write_scores}"), "x"), groups, process.device)
    for step, microbatches in steps.items():
        check(f"cached {step}", source.fill(step, microbatches), ran=False)
    return problems


def test_every_rank_has_its_part(tmp_path: Path) -> None:
    """Two bytes a score on disk hold these numbers exactly, so all comparisons are of bits."""
    make_data(tmp_path)
    for found in run_ranks(2, on_rank, str(tmp_path)):
        assert found == {name: [] for name in LAYOUTS}
    for name in LAYOUTS:
        folder = tmp_path / f"kept {name}"
        manifest = CacheManifest.read(folder, "x")
        assert [block.samples for block in blocks_of(manifest)] == [5, 5, 5, 5, 4]
        kept = ScoreCache(folder, manifest)
        for number in range(STEPS * SAMPLES):
            assert kept.quanta(0, number).tolist() == quanta_of(0, number).tolist()
