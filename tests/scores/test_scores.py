"""Scores on disk: the online run again in any layout, kills survived, and a cache that does not fit is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron.config import parse_recipe
from remit_megatron.errors import RemitError
from remit_megatron.run.checkpoint import read_meta, write_meta
from remit_megatron.scores.block import HEADER_BYTES
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest
from tests.objectives.around import Around
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, train_all

pytestmark = pytest.mark.slow

SMALL_BLOCKS = 10 * 2 * SEQUENCE
"""Ten samples, so that a run of 96 has ten blocks, the last a short one."""


def score_all(rank: int, jobs: list[tuple[Any, str, tuple[int, int], int]]) -> list[tuple[int, str]]:
    """Jobs (recipe, folder, shard, samples to check) one after the other; (exit code, message) of each."""
    import torch
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process
    from remit_megatron.scores import cache
    from remit_megatron.scores.score import score_on

    activate("cpu")
    cache.BLOCK_BYTES = SMALL_BLOCKS
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    outcomes = []
    for recipe, folder, shard, check in jobs:
        try:
            score_on(parse_recipe(recipe), Path(folder), process, shard, check)
            outcomes.append((0, ""))
        except RemitError as error:
            outcomes.append((error.exit_code, str(error)))
        finally:
            dist.barrier()
            destroy_groups()
    return outcomes


def score_and_train(rank: int, jobs: list[Any], recipes: list[Any]) -> list[tuple[int, str]]:
    return score_all(rank, jobs) + train_all(rank, recipes)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, temporary ones included."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def cached(folder: Path, run: str, scores: Path, **changes: Any) -> dict[str, Any]:
    recipe = remit(folder, run, **changes)
    recipe["reference"]["scores"] = str(scores)
    return recipe


@pytest.fixture(scope="module")
def scores(folder: Path) -> Path:
    """Scores made on one rank; runs online, online and rounded, and from these scores."""
    path = folder / "scores"
    rounded = remit(folder, "scores rounded")
    rounded["reference"]["round_scores"] = True
    selected = {"objective": {"name": "rho1", "scope": "global"}}
    selected_rounded = remit(folder, "scores selected rounded", **selected)
    selected_rounded["reference"]["round_scores"] = True
    recipes = [
        remit(folder, "scores online"),
        rounded,
        cached(folder, "scores cached", path),
        selected_rounded,
        cached(folder, "scores selected cached", path, **selected),
    ]
    recipes[2]["reference"]["check_samples"] = 0
    (outcomes,) = run_ranks(1, score_and_train, [(remit(folder, "x"), str(path), (0, 1), 0)], recipes)
    assert outcomes == [(0, "")] * 6
    return path


def test_cached_is_online_rounded_bit_for_bit(folder: Path, scores: Path) -> None:
    assert metrics(folder, "scores cached") == metrics(folder, "scores rounded")
    assert metrics(folder, "scores selected cached") == metrics(folder, "scores selected rounded")
    # Rounding errs by half a step, 2.5e-4 nat, in the gap; a token's weight by half of that at most.
    for got, want in zip(metrics(folder, "scores cached"), metrics(folder, "scores online"), strict=True):
        assert got != want
        assert got["weight_mean"] == pytest.approx(want["weight_mean"], abs=2.5e-4)
        assert got["ref_nll"] == pytest.approx(want["ref_nll"], abs=2.5e-4)


def test_content_on_disk(folder: Path, scores: Path) -> None:
    """Two bytes a token, one file a block of ten samples, and what is stored is the reference's NLL."""
    files = sorted(scores.rglob("*.scores"))
    assert [p.name for p in files] == [f"{i:08d}.scores" for i in range(10)]
    payload = sum(p.stat().st_size - HEADER_BYTES for p in files)
    assert payload == 12 * SAMPLES * SEQUENCE * 2
    steps = np.concatenate([np.frombuffer(p.read_bytes()[HEADER_BYTES:], dtype="<u2") for p in files])
    assert steps.std() > 100
    # The run's steps read these samples in this order, each once.
    online = [line["ref_nll"] for line in metrics(folder, "scores online")]
    per_step = steps.reshape(12, -1).mean(axis=1) / 2048
    assert per_step == pytest.approx(online, abs=2.5e-4)


def test_export_by_token(folder: Path, scores: Path, tmp_path: Path) -> None:
    """Each token's score stands where the token does; `remit data select` takes it, and ranks documents by it."""
    from data_prep.select import select
    from remit_megatron.data.indexed import open_index
    from remit_megatron.mcore.datasets import open_source
    from remit_megatron.scores.export import export_scores

    recipe = parse_recipe(cached(folder, "exported", scores))
    (path,) = export_scores(recipe, None, str(tmp_path))
    assert path.name == "train.npy"
    found = np.load(path)
    source = open_source(str(folder / "train"), recipe.data, 61)
    cache = ScoreCache(scores, CacheManifest.read(scores, "x"))
    seen = np.zeros(len(found), dtype=bool)
    for sample in range(12 * SAMPLES):
        places = source.packed.places(sample)
        assert (source.packed.indexed.tokens[places] == source.text(sample)).all()
        assert (found[places[1:]] == cache.scores(0, sample)).all()
        seen[places[1:]] = True
    assert seen.sum() == 12 * SAMPLES * SEQUENCE
    assert np.isnan(found[~seen]).all()

    small = tmp_path / "small.npy"
    np.save(small, np.where(np.isnan(found), np.nan, np.float32(3.0)))
    (tmp_path / "small.npy.json").write_text((tmp_path / "train.npy.json").read_text())
    documents = len(open_index(str(folder / "train")).lengths)
    report = select(str(folder / "train"), large=path, small=small, keep=0.1, output=str(tmp_path / "best"))
    assert len(open_index(str(tmp_path / "best")).lengths) == int(0.1 * documents), report


def test_other_layouts_and_batches(folder: Path, scores: Path) -> None:
    """Made in two shards at TP2, read at PP2 and DP2 with other batches; the order of the blocks is of no account."""
    path, again = folder / "scores tp2", folder / "scores cp2"
    tp2 = remit(folder, "x", parallel={"tensor": 2})
    cp2 = remit(folder, "x", parallel={"context": 2}, batch={"microbatch_samples": 4})
    batch = {"global_batch_tokens": SEQUENCE * 16, "microbatch_samples": 4}
    layouts = {"pp2": {"pipeline": 2, "virtual_pipeline": 2}, "dp2": {}}
    recipes = []
    for name, layout in layouts.items():
        recipes.append(remit(folder, f"scores {name} online", parallel=layout, batch=batch))
        recipes.append(cached(folder, f"scores {name} cached", path, parallel=layout, batch=batch))
    jobs = [
        (tp2, str(path), (1, 2), 0),
        (tp2, str(path), (0, 2), 0),
        (cp2, str(again), (0, 1), 0),
        (remit(folder, "x"), str(path), (0, 1), 40),
    ]
    for outcomes in run_ranks(2, score_and_train, jobs, recipes):
        assert outcomes == [(0, "")] * 8
    for name in layouts:
        pairs = zip(metrics(folder, f"scores {name} cached"), metrics(folder, f"scores {name} online"), strict=True)
        for got, want in pairs:
            assert got["ref_nll"] == pytest.approx(want["ref_nll"], abs=2.5e-4)
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
    # Another layout's round-off moves a score over the edge of a step now and then, and by no more than a step.
    whole = content(scores)
    for other in (path, again):
        assert content(other).keys() == whole.keys()
        for name, data in content(other).items():
            if name.endswith(".scores"):
                a, b = (np.frombuffer(x[HEADER_BYTES:], dtype="<u2").astype(int) for x in (data, whole[name]))
                assert np.abs(a - b).max() <= 1
                assert (a != b).mean() < 0.02


class Weights(Around):
    """An objective that keeps the weight of each unmasked token, by step, sample and place in it."""

    def __init__(self, trainer: Any):
        super().__init__(trainer.parts.objective)
        self.trainer = trainer
        self.seen: dict[tuple[int, int, int], float] = {}

    def __call__(self, stats: Any) -> Any:
        weights = self.trainer.parts.objective.weights(stats)
        for row, sample in enumerate(stats.sample_id.tolist()):
            for column, position in enumerate(stats.positions.tolist()):
                key = (self.trainer.step.progress.meta.step + 1, sample, position)
                self.seen[key] = float(weights[row, column])
        return self.inner(stats)


def score_and_weigh(rank: int, job: Any, recipes: list[Any]) -> tuple[Any, list[dict[tuple[int, int, int], float]]]:
    """A job of `score_all`, then runs; every token's weight that this rank used in each run."""
    import torch
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.run.process import Process, StopSignals
    from remit_megatron.train.loop import start

    outcome, size, found = score_all(rank, [job]), dist.get_world_size(), []
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    for recipe in recipes:
        trainer = start(parse_recipe(recipe), process)
        recorder = Weights(trainer)
        trainer.step.forward_step.objective = recorder
        trainer.run(StopSignals())
        trainer.close()
        found.append(recorder.seen)
        dist.barrier()
        destroy_groups()
    return outcome, found


def test_every_weight_of_another_layout(folder: Path) -> None:
    """Scores made at TP2xDP2 serve PP2xDP2 with half the batch: no token's weight differs from the online run's by more
    than 2.5e-4, at any step."""
    path = folder / "scores tp2xdp2"
    batch = {"global_batch_tokens": SEQUENCE * 4, "microbatch_samples": 1}
    schedule = {"train_tokens": 12 * SEQUENCE * SAMPLES}
    layout = {"parallel": {"pipeline": 2}, "batch": batch, "schedule": schedule}
    job = (remit(folder, "x", parallel={"tensor": 2}), str(path), (0, 1), 0)
    recipes = [remit(folder, "weighed online", **layout), cached(folder, "weighed cached", path, **layout)]
    online: dict[tuple[int, int, int], float] = {}
    stored: dict[tuple[int, int, int], float] = {}
    for outcome, (one, other) in run_ranks(4, score_and_weigh, job, recipes):
        assert outcome == [(0, "")]
        online |= one
        stored |= other
    assert online.keys() == stored.keys()
    assert len(online) == 12 * SAMPLES * SEQUENCE
    a, b = (np.array([weights[key] for key in sorted(online)]) for weights in (online, stored))
    assert a.std() > 0.05
    assert 0 < np.abs(a - b).max() <= 2.5e-4


def write_through_all(rank: int, recipes: list[Any]) -> list[tuple[int, str]]:
    from remit_megatron.scores import cache

    cache.BLOCK_BYTES = SMALL_BLOCKS
    return train_all(rank, recipes)


def test_write_through(folder: Path) -> None:
    """Two epochs: the first fills the cache, the second and other runs read it; all as if scored online."""
    path, other = folder / "scores written", folder / "scores made ahead"
    data = {"data": {"train": [{"path": str(folder / "held")}]}}
    steps = {"schedule": {"train_tokens": 20 * SEQUENCE * SAMPLES}}
    rounded = remit(folder, "through rounded", **data, **steps)
    rounded["reference"]["round_scores"] = True
    recipes = [rounded]
    for run in ("through written", "through again"):
        recipes.append(remit(folder, run, parallel={"context": 2}, **data, **steps))
        recipes[-1]["reference"]["write_scores"] = str(path)
    outcomes = run_ranks(2, write_through_all, recipes[:2])
    assert outcomes == [[(0, "")] * 2] * 2
    manifest = CacheManifest.read(path, "x")
    cache, total = ScoreCache(path, manifest), manifest.sources[0].samples
    assert 8 * SAMPLES < total < 12 * SAMPLES, "the run must have come to its second epoch"
    assert not cache.missing()
    # The order of sums differs between DP2 and CP2; a score next to the edge of a step may round the other way.
    pairs = list(zip(metrics(folder, "through written"), metrics(folder, "through rounded"), strict=True))
    for got, want in pairs:
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["ref_nll"] == pytest.approx(want["ref_nll"], abs=1e-4)
    (ahead,) = run_ranks(1, score_all, [(remit(folder, "x", **data, **steps), str(other), (0, 1), 0)])
    assert ahead == [(0, "")]
    theirs = ScoreCache(other, CacheManifest.read(other, "x"))
    for number in range(total):
        assert np.abs(cache.quanta(0, number).astype(int) - theirs.quanta(0, number)).max() <= 1

    for block in blocks_of(manifest):  # numbers that no model gives show where they are used
        constant = np.full((block.samples, SEQUENCE), 4096, dtype=np.int32)
        cache.write_block(block, constant, np.ones_like(constant))
    assert run_ranks(2, write_through_all, recipes[2:]) == [[(0, "")]] * 2
    assert {line["ref_nll"] for line in metrics(folder, "through again")} == {2.0}


def test_each_misfit_is_refused_by_name(folder: Path, scores: Path) -> None:
    def changed(name: str, change: Callable[[Path], None]) -> Path:
        path = folder / f"scores {name}"
        shutil.copytree(scores, path)
        change(path)
        return path

    def flip(path: Path) -> None:
        file = path / "source-000" / "00000003.scores"
        data = bytearray(file.read_bytes())
        data[HEADER_BYTES + 77] ^= 4
        file.write_bytes(data)

    def edit(path: Path) -> None:
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"precision": "fp32"', '"precision": "bf16"'))

    def saturate(path: Path) -> None:
        manifest = CacheManifest.read(path, "x")
        block = blocks_of(manifest)[0]
        cache = ScoreCache(path, manifest)
        steps = np.full((block.samples, SEQUENCE), 65535, dtype=np.int32)
        cache.write_block(block, steps, np.ones_like(steps))

    def of_another_model(path: Path) -> None:
        """Whole and consistent, but the numbers are others."""
        manifest = CacheManifest.read(path, "x")
        for block in blocks_of(manifest):
            steps = np.full((block.samples, SEQUENCE), 4000, dtype=np.int32)
            ScoreCache(path, manifest).write_block(block, steps, np.ones_like(steps))

    base = folder / "scores other reference"
    shutil.copytree(folder / "base", base)
    for meta in base.glob("checkpoints/*/meta.json"):
        write_meta(meta.parent, replace(read_meta(meta.parent), tokens=5))
    run = "scores refused"
    more = {"schedule": {"train_tokens": 20 * SEQUENCE * SAMPLES}}
    bf16 = {"compute": {"precision": "bf16"}}
    other_data = {"data": {"train": [{"path": str(folder / "held")}], "eval": {}}, **more}
    cases = {
        "the reference's weights": cached(folder, run, scores, reference={"path": str(base)}),
        "data.sequence_length": cached(folder, run, scores, data={"sequence_length": 8}),
        "data.seed": cached(folder, run, scores, data={"seed": 5}),
        "data.document_mask": cached(folder, run, scores, data={"document_mask": True}),
        "data.eod_mask_loss": cached(folder, run, scores, data={"eod_mask_loss": True}),
        "the precision was fp32": cached(folder, run, scores, **bf16),
        "no scores of the dataset": cached(folder, run, scores, **other_data),
        "the run needs 160": cached(folder, run, scores, **more),
        "its SHA-256": cached(folder, run, changed("flipped", flip)),
        "lacks 1 of 10 blocks": cached(
            folder, run, changed("lacking", lambda p: (p / "source-000" / "00000007.scores").unlink())
        ),
        "manifest.json was damaged": cached(folder, run, changed("edited", edit)),
        "of its tokens at the largest score": cached(folder, run, changed("saturated", saturate)),
        "are not those of reference.path": cached(folder, run, changed("exchanged", of_another_model)),
        "holds no scores": cached(folder, run, folder / "nowhere"),
        "data.seed was": remit(
            folder,
            run,
            reference={"path": str(folder / "base"), "write_scores": str(scores)},
            data={"seed": 6},
        ),
    }
    (outcomes,) = run_ranks(1, train_all, list(cases.values()))
    problems = [
        f"{message}: {code} {text}"
        for message, (code, text) in zip(cases, outcomes, strict=True)
        if code != 2 or message not in text or ("scores" not in text and "SHA-256" not in text)
    ]
    assert not problems, "\n".join(problems)
    assert not (folder / run).exists(), "a refused run wrote something"
