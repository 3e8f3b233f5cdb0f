"""Kept distributions: the runs that had them whole again, from disk, from a scorer and online; what does not fit is
refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remit_megatron.config import parse_recipe
from remit_megatron.data.microbatch import Scores
from remit_megatron.errors import UserError
from remit_megatron.ops.top_tokens import TopTokens
from remit_megatron.run.checkpoint import read_meta, write_meta
from remit_megatron.scores.block import HEADER_BYTES
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest, KeptDistribution
from remit_megatron.scores.record import (
    from_planes,
    num_planes,
    pack_rows,
    queued_row,
    stored_row,
    to_planes,
    unpack_planes,
)
from tests.ranks import run_ranks
from tests.scores.manifests import score_manifest
from tests.train.runs import SAMPLES, SEQUENCE, VOCAB, metrics, remit, train_all

STEPS = 2
SHORT: dict[str, Any] = {
    "checkpoint": {"every_steps": 0},
    "evaluation": {"every_steps": 0},
    "schedule": {"train_tokens": STEPS * SEQUENCE * SAMPLES, "warmup_tokens": 0},
    "data": {"eod_mask_loss": True},
}
KD = {"name": "kd", "kd_alpha": 0.5, "temperature": 2.0, "scale": "tau_squared"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": KD,
    "reverse": {**KD, "direction": "reverse"},
    "switch": {"name": "switch"},
    "top1": {"name": "switch", "target": "top1", "means": "token"},
    "trkd": {"name": "trkd", "temperature": 2.0, "share": 0.5},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
}


def recipe(folder: Path, run: str, objective: str, layout: str, **reference: Any) -> dict[str, Any]:
    made = remit(folder, f"kept {run}", **SHORT, parallel=LAYOUTS[layout])
    made["objective"] = OBJECTIVES.get(objective, {"name": objective})
    made["reference"] = {**made["reference"], "head_chunk_tokens": 24, **reference}
    return made


def score_follow_train(
    rank: int, scored: list[tuple[Any, str]], followed: list[Any], recipes: list[Any]
) -> list[tuple[int, str]]:
    """Recipes scored into folders; recipes whose run says what it needs and stops, and whose scorer scores every step;
    recipes trained. (exit code, message) of the last."""
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process
    from remit_megatron.scores import cache
    from remit_megatron.scores.follow import follow_on
    from remit_megatron.scores.score import score_on
    from remit_megatron.train.loop import start

    activate("cpu")
    cache.BLOCK_BYTES = 20_000
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    for one, folder in scored:
        score_on(parse_recipe(one), Path(folder), process)
        destroy_groups()
    for one in followed:
        state = parse_recipe(one).queue_folder / "scorer.json"

        def finished(state: Path = state) -> bool:
            return state.exists() and len(json.loads(state.read_text())["ready"]) == STEPS

        trainer = start(parse_recipe(one), process)
        dist.barrier()
        destroy_groups()
        follow_on(parse_recipe(one).for_scorer(), process, finished)
        trainer.close()
        dist.barrier()
        destroy_groups()
    return train_all(rank, recipes)


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[int, str]]:
    """Every run of this file by its name, in one spawn."""
    disk = {"whole": VOCAB, "few": 9}
    scored = [
        (recipe(folder, "x", "forward", "tp2", distribution=top_k), str(folder / name)) for name, top_k in disk.items()
    ]
    scored.append((recipe(folder, "x", "remit", "tp2"), str(folder / "labels")))
    runs: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for name in OBJECTIVES:
        runs[f"{name} tp2 online"] = (name, "tp2", {})
        runs[f"{name} tp2 disk"] = (name, "tp2", {"distribution": VOCAB, "scores": str(folder / "whole")})
    runs["switch tp2 online kept"] = ("switch", "tp2", {"distribution": VOCAB})
    for layout in ("pp2", "cp2"):
        runs[f"switch {layout} online"] = ("switch", layout, {})
        here = {"scores": str(folder / "whole"), "check_samples": 0}
        runs[f"switch {layout} disk"] = ("switch", layout, {"distribution": VOCAB, **here})
    runs["forward few"] = ("forward", "tp2", {"distribution": 9, "scores": str(folder / "few")})
    runs["remit labels"] = ("remit", "dp2", {"scores": str(folder / "labels")})
    runs["remit few"] = ("remit", "dp2", {"scores": str(folder / "few")})
    written = {"distribution": 9, "write_scores": str(folder / "written")}
    runs["switch writes"] = ("switch", "cp2", written)
    runs["switch reads"] = ("switch", "cp2", {"distribution": 9, "scores": str(folder / "written")})
    runs["switch online few"] = ("switch", "cp2", {"distribution": 9})
    queue = {"distribution": 9, "queue": {"ahead_steps": STEPS, "timeout_s": 1.0}}
    runs["switch beside"] = ("switch", "cp2", queue)
    runs["switch alone"] = ("switch", "cp2", {"distribution": 9, "queue": {"timeout_s": 1.0}})
    recipes = {run: recipe(folder, run, name, layout, **more) for run, (name, layout, more) in runs.items()}
    found = run_ranks(2, score_follow_train, scored, [recipes["switch beside"]], list(recipes.values()))
    return dict(zip(recipes, found[0], strict=True))


def lines(folder: Path, run: str) -> list[dict[str, Any]]:
    return metrics(folder, f"kept {run}")


@pytest.mark.slow
def test_runs_end_well(outcomes: dict[str, tuple[int, str]]) -> None:
    assert outcomes == dict.fromkeys(outcomes, (0, ""))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_disk_is_online(folder: Path, outcomes: dict[str, tuple[int, str]], name: str) -> None:
    """Where all tokens are kept: as whole up to the quanta of log-probabilities, which err by 2.5e-4 nat at most, times
    the squared temperature."""
    disk, online = lines(folder, f"{name} tp2 disk"), lines(folder, f"{name} tp2 online")
    for got, want in zip(disk, online, strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=2e-5)
        for exact in ("routed", "ref_entropy", "entropy_threshold", "agrees_routed", "agrees_rest"):
            assert (exact in got) == (exact in want)
            if exact in want:
                assert got[exact] == pytest.approx(want[exact], rel=1e-6)


@pytest.mark.slow
def test_kept_online_is_disk_bit_for_bit(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    assert lines(folder, "switch tp2 disk") == lines(folder, "switch tp2 online kept")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "cp2"])
def test_other_layouts(folder: Path, outcomes: dict[str, tuple[int, str]], layout: str) -> None:
    """Made on two tensor-parallel ranks, read in another layout; as online there."""
    pairs = zip(lines(folder, f"switch {layout} disk"), lines(folder, f"switch {layout} online"), strict=True)
    for got, want in pairs:
        assert got == pytest.approx(want, rel=1e-3, abs=2e-5)


@pytest.mark.slow
def test_a_few_tokens_are_a_lower_bound(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    few, whole = lines(folder, "forward few")[0], lines(folder, "forward tp2 disk")[0]
    assert few["nll"] == whole["nll"]
    assert 0 < few["kl"] < 0.999 * whole["kl"]


@pytest.mark.slow
def test_remit_reads_the_labels_scores(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    assert lines(folder, "remit few") == lines(folder, "remit labels")


@pytest.mark.slow
def test_written_and_beside_the_run(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    """Whoever makes what is kept: the same run, bit for bit; also where no scorer comes."""
    want = lines(folder, "switch online few")
    for run in ("switch writes", "switch reads", "switch beside", "switch alone"):
        assert lines(folder, run) == want, run
    for run, online in (("switch beside", 0), ("switch alone", 1)):
        text = (folder / f"kept {run}" / "metrics.jsonl").read_text()
        assert {json.loads(line)["scored_online"] for line in text.splitlines()} == {online}
    assert not ScoreCache(folder / "written", CacheManifest.read(folder / "written", "x")).missing()


@pytest.mark.slow
def test_bytes_a_token(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    for name, top_k in (("whole", VOCAB), ("few", 9)):
        manifest = CacheManifest.read(folder / name, "x")
        sizes = [path.stat().st_size - HEADER_BYTES for path in (folder / name).rglob("*.scores")]
        assert len(sizes) == len(blocks_of(manifest))
        assert sum(sizes) == STEPS * SAMPLES * SEQUENCE * (10 + 4 * top_k)


@pytest.mark.slow
def test_each_misfit_is_refused_by_name(folder: Path, outcomes: dict[str, tuple[int, str]]) -> None:
    damaged = folder / "damaged"
    shutil.copytree(folder / "whole", damaged)
    block = damaged / "source-000" / "00000001.scores"
    content = bytearray(block.read_bytes())
    content[-3] ^= 4
    block.write_bytes(content)
    moved = folder / "moved"
    shutil.copytree(folder / "whole", moved)
    shutil.copyfile(folder / "few" / "source-000" / "00000000.scores", moved / "source-000" / "00000000.scores")
    other = folder / "other teacher"
    shutil.copytree(folder / "base", other)
    for meta in other.glob("checkpoints/*/meta.json"):
        write_meta(meta.parent, replace(read_meta(meta.parent), tokens=7))

    def reading(objective: str, scores: str, **reference: Any) -> dict[str, Any]:
        made = recipe(folder, "refused", objective, "dp2", scores=str(folder / scores), **reference)
        made["parallel"] = {}
        return made

    colder = reading("forward", "whole", distribution=VOCAB)
    colder["objective"] = {**KD, "temperature": 1.0}
    cases = {
        "reference.distribution was 61 when they were made, this recipe has 9": reading(
            "forward", "whole", distribution=9
        ),
        "its entropy (objective.temperature) was 2.0 when they were made, this recipe has 1.0": colder,
        "the reference's weights was": reading("switch", "whole", distribution=VOCAB, path=str(other)),
        "00000001.scores: its SHA-256 is not the one in its header": reading("trkd", "damaged", distribution=VOCAB),
        "00000000.scores: its scores are of another": reading("switch", "moved", distribution=VOCAB),
        "reference.distribution was 0 when they were made, this recipe has 61": reading(
            "switch", "labels", distribution=VOCAB
        ),
        "reference.distribution = 62 is more than the 61 tokens": reading("switch", "whole", distribution=62),
    }
    (found,) = run_ranks(1, train_all, list(cases.values()))
    for message, (code, text) in zip(cases, found, strict=True):
        assert message in text
        # A block of another folder is met while the run reads; the rest is asked before it starts.
        assert code == (1 if "are of another" in message else 2), text
    assert not (folder / "kept refused").exists(), "a refused run wrote something"


def test_recipes_that_cannot_be(tmp_path: Path) -> None:
    for key, value in (("scores", "x"), ("write_scores", "x"), ("queue", {})):
        with pytest.raises(
            UserError, match=rf"reference\.{key} carries one number a token, and objective\.name = 'kd'"
        ):
            parse_recipe(recipe(tmp_path, "x", "forward", "dp2", **{key: value}))
    made = recipe(tmp_path, "x", "forward", "dp2", distribution=9)
    made["objective"] = {**KD, "top_k": 8}
    with pytest.raises(UserError, match=r"reference\.distribution = 9 and objective\.top_k = 8"):
        parse_recipe(made)
    made["objective"]["top_k"] = 9
    assert parse_recipe(made).identity()["kept_distribution"] == 9
    assert "kept_distribution" not in parse_recipe(recipe(tmp_path, "x", "forward", "dp2")).identity()


@pytest.mark.parametrize("vocab", [60_000, 100_352, 262_144])
def test_rows_hold_everything(vocab: int) -> None:
    """Whatever the vocabulary, and also what is no number; in as many bytes as the bits that it needs."""
    top_k, generator = 11, np.random.default_rng(0)
    kept = KeptDistribution(top_k=top_k, temperature=2.0, vocab_size=vocab)
    manifest = score_manifest(40, distribution=kept)
    ids = torch.from_numpy(generator.integers(0, vocab, (3, 4, top_k)).astype(np.int32))
    ids[0, 0, :2] = torch.tensor([vocab - 1, 0])
    quanta = torch.from_numpy(generator.integers(0, 65536, (3, 4, top_k)))
    tails = torch.tensor([-0.5, -torch.inf, torch.nan, -80.0]).expand(3, 4)
    top = TopTokens(ids=ids, log_probs=-quanta / 2048, log_tail=tails)
    planes = to_planes(Scores(entropy=torch.rand(3, 4), top=top))
    assert len(planes) == num_planes(kept)
    assert (planes + torch.zeros_like(planes)).equal(planes)
    for row, nll in ((stored_row(manifest), 2), (queued_row(manifest), 4)):
        bits = {60_000: 0, 100_352: 1, 262_144: 2}[vocab]
        assert row.itemsize == 4 * (nll + 8 + 4 * top_k + 2 * bits)
        rows = pack_rows(row, np.full((3, 4), 7), planes.numpy())
        again = unpack_planes(np.frombuffer(rows.tobytes(), dtype=row))
        assert again.equal(planes)
    found = from_planes(again, ids[..., 0].long(), torch.zeros(3, 4))
    assert found.top is not None
    assert found.top.ids.equal(ids)
    assert found.top.log_probs.equal(top.log_probs)
    assert found.top.log_tail.isnan().equal(tails.isnan())
    assert found.agrees is not None
    assert found.agrees.all()
