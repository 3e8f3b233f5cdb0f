"""A scorer beside the run: the online run again in any layout, bit for bit in the same one."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch.scorers import devices
from remit_megatron.config import parse_recipe
from remit_megatron.data.files import locked
from remit_megatron.errors import RemitError, UserError
from remit_megatron.ops.score_quanta import QUANTA_PER_NAT
from remit_megatron.scores.cache import ScoreCache
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.queue import (
    RUN_LOCK,
    QueueManifest,
    ScorerSide,
    write_step,
)
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, train_all, weights

STEPS = 12
SHORT = {"checkpoint": {"every_steps": 0}, "evaluation": {"every_steps": 0}}


def queued(folder: Path, run: str, queue: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The recipe of a run whose scorer may be ahead by all of its steps."""
    recipe = remit(folder, run, **{**SHORT, **changes})
    recipe["reference"] = {**recipe["reference"], "queue": {"ahead_steps": STEPS, "timeout_s": 1.0, **(queue or {})}}
    return recipe


def lines(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def follow_and_train(
    rank: int, jobs: list[tuple[Any, Any]], recipes: list[Any]
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Jobs (recipe of a run, of its scorer): the run says what it needs and stops, the scorer scores every step. Then
    recipes are trained. (exit code, message) of each."""
    import torch
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process
    from remit_megatron.scores.follow import follow_on
    from remit_megatron.train.loop import start

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    outcomes = []
    for run, scorer in jobs:
        state = parse_recipe(scorer).queue_folder / "scorer.json"

        def finished(state: Path = state) -> bool:
            return state.exists() and len(json.loads(state.read_text())["ready"]) == STEPS

        trainer = None
        try:
            trainer = start(parse_recipe(run), process)
            dist.barrier()
            destroy_groups()
            follow_on(parse_recipe(scorer).for_scorer(), process, finished)
            outcomes.append((0, ""))
        except RemitError as error:
            outcomes.append((error.exit_code, str(error)))
        finally:
            if trainer:
                trainer.close()
            dist.barrier()
            destroy_groups()
    return outcomes, train_all(rank, recipes)


def test_queued_is_online_in_any_layout(folder: Path) -> None:
    """Same layout: bit for bit. In another one: to float32 round-off. Whoever refuses says what differs."""
    rho1 = {"objective": {"name": "rho1", "scope": "global"}}
    rounded = {"reference": {"path": str(folder / "base"), "round_scores": True}}
    tp2, batch = {"tensor": 2, "sequence": True}, {"global_batch_tokens": 128, "microbatch_samples": 4}
    interleaved = {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "microbatch_samples": 1}
    pairs = {
        "dp2": ({}, {}),
        "dp2 rounded": ({}, rounded),
        "dp2 rho1": ({}, rho1),
        "tp2": (interleaved, {"parallel": tp2, "batch": batch}),
        "cp2": ({"parallel": {}}, {"parallel": {"context": 2}}),
        "pp2": ({"parallel": {"tensor": 2}}, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    }
    record = {"logging": {"tokens_every_steps": 5, "tokens_samples": 3}, "data": {"eod_mask_loss": True}}
    pairs = {name: (queue, {**record, **changes}) for name, (queue, changes) in pairs.items()}
    runs = {name: queued(folder, f"queued {name}", queue, **changes) for name, (queue, changes) in pairs.items()}
    kept = folder / "queued kept"
    runs["dp2 rounded"]["reference"]["write_scores"] = str(kept)
    online = [remit(folder, f"online {name}", **SHORT, **changes) for name, (_, changes) in pairs.items()]
    masks = {"data": {"eod_mask_loss": True}}
    stopping = queued(folder, "queued stop", {"fallback": "stop"}, **masks)
    alone = queued(folder, "queued alone", **masks)
    wrong = [
        remit(folder, "queued alone", **change)
        for change in (
            {"reference": {"path": str(folder / "queued dp2")}, **masks},
            {"data": {"sequence_length": 8}, "batch": {"global_batch_tokens": 64}},
            {"data": {"eod_mask_loss": False}},
            {"batch": {"global_batch_tokens": 256}, **masks},
        )
    ]
    for one in wrong:
        one["reference"] = {**one["reference"], "queue": {}}
    jobs = [(run, run) for run in runs.values()] + [(stopping, stopping)]
    recipes = [*runs.values(), stopping, *online, alone, queued(folder, "queued nobody", {"fallback": "stop"})]
    nothing = (0, "")
    for followed, trained in run_ranks(2, follow_and_train, jobs, recipes):
        assert followed == [nothing] * len(jobs)
        assert trained[:-1] == [nothing] * (len(recipes) - 1)
        code, message = trained[-1]
        assert code == 1
        assert "step 1 has no scores: no scorer has come yet, and fallback = 'stop' after 1 s" in message

    for name in ("dp2", "dp2 rounded", "dp2 rho1"):
        assert metrics(folder, f"queued {name}") == metrics(folder, f"online {name}"), name
        assert weights(folder, f"queued {name}") == weights(folder, f"online {name}"), name
    assert metrics(folder, "queued dp2 rounded") != metrics(folder, "queued dp2"), "rounding must show"
    for name, rounds in (("dp2 rounded", True), ("dp2", False)):
        records = pq.read_table(folder / f"queued {name}" / "tokens" / "step-00000005.parquet")
        steps = records["ref_nll"].to_numpy() * QUANTA_PER_NAT
        assert (steps == steps.round()).all() == rounds, "records have the scores that training used"
    cache = ScoreCache(kept, CacheManifest.read(kept, "x"))
    assert not cache.missing(), "what a scorer makes is kept as well"
    assert cache.scores(0, 95).std() > 0.1
    for name in ("tp2", "cp2", "pp2"):
        for got, want in zip(metrics(folder, f"queued {name}"), metrics(folder, f"online {name}"), strict=True):
            counts = got.pop("token_weights", None), want.pop("token_weights", None)
            assert (counts[0] is None) == (counts[1] is None)
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    plain = [{k: v for k, v in line.items() if k != "token_weights"} for line in metrics(folder, "online dp2")]
    assert metrics(folder, "queued stop") == plain
    for name in (*pairs, "stop"):
        assert all(line["scored_online"] == line["wait_ms"] == 0 for line in lines(folder, f"queued {name}")), name
    # Nobody scored for this one: it did, and said so once.
    assert metrics(folder, "queued alone") == plain
    assert all(line["scored_online"] == 1 for line in lines(folder, "queued alone"))
    assert (folder / "queued alone" / "log.txt").read_text().count(
        "no scorer has come yet: scores are made online"
    ) == 1

    words = ("the reference's weights", "data.sequence_length", "data.eod_mask_loss", "the samples a step")
    one_rank = remit(folder, "online one rank", **SHORT, **record)
    over = (runs["dp2"], wrong[0] | {"run": runs["dp2"]["run"]})
    (folder / "queued alone" / "DONE").unlink()
    jobs = [over, *((alone, one) for one in wrong)]
    (of_a_run_that_is_over, *refused), trained = run_ranks(1, follow_and_train, jobs, [one_rank])[0]
    assert of_a_run_that_is_over == nothing, "there is nothing to score, and so nothing to refuse"
    assert trained == [nothing]
    check_records(folder, ["queued dp2", *(f"queued {name}" for name in ("tp2", "cp2", "pp2"))])
    for word, (code, message) in zip(words, refused, strict=True):
        assert code == 2
        assert f"needs other scores than this recipe's: {word}" in message


def test_a_second_run_on_one_folder_is_refused(folder: Path) -> None:
    shared = folder / "shared queue"
    shared.mkdir()
    with locked(shared / RUN_LOCK):  # as the first run holds it
        ((code, message),) = run_ranks(1, train_all, [queued(folder, "second", {"folder": str(shared)})])[0]
    assert code == 2
    assert f"another run uses {shared}" in message


def fill_and_go_on(rank: int, first: Any, second: Any) -> list[tuple[int, str]]:
    """A run that leaves scores on disk, then a longer one beside a scorer, whose scores are all 2 nats."""
    from remit_megatron.scores import cache

    cache.BLOCK_BYTES = 12 * 2 * SEQUENCE
    scorer = threading.Thread(target=_constant_scorer, args=(parse_recipe(second).queue_folder,))
    outcomes = train_all(rank, [first])
    scorer.start()
    outcomes += train_all(rank, [second])
    scorer.join()
    return outcomes


def _constant_scorer(folder: Path) -> None:
    """Two steps ahead of the run of one source; it stands still after 10 seconds without work."""
    while not (folder / "run.json").exists():
        time.sleep(0.01)
    manifest = QueueManifest.model_validate(json.loads((folder / "run.json").read_text())["manifest"], strict=False)
    side, worked_s, count = ScorerSide(folder, manifest, 2), time.monotonic(), manifest.step_samples
    while time.monotonic() - worked_s < 10:
        step, done = side.next()
        if done:
            return
        if step is None:
            time.sleep(0.01)
            continue
        samples = [(0, n) for n in range((step - 1) * count, step * count)]
        write_step(folder, step, manifest, samples, np.full((count, SEQUENCE), 2.0))
        side.announce(step)
        worked_s = time.monotonic()


def test_scores_from_disk_and_then_from_a_scorer(folder: Path) -> None:
    """Steps that are read from disk take the scorer along; a block that was short for a shorter run is made again."""
    kept = folder / "kept of a shorter run"
    first = remit(folder, "kept first", **SHORT, schedule={"train_tokens": 4 * SEQUENCE * SAMPLES})
    second = queued(folder, "kept second", {"ahead_steps": 2, "timeout_s": 5.0, "fallback": "stop"})
    for recipe in (first, second):
        recipe["reference"]["write_scores"] = str(kept)
    assert run_ranks(1, fill_and_go_on, first, second) == [[(0, "")] * 2]
    of_reference = [line["ref_nll"] for line in metrics(folder, "kept first")]
    # 32 samples were kept, in blocks of 12: the third has room for more.
    assert [line["ref_nll"] for line in metrics(folder, "kept second")] == [*of_reference[:3], *[2.0] * (STEPS - 3)]
    assert not ScoreCache(kept, CacheManifest.read(kept, "x")).missing()


def check_records(folder: Path, runs: list[str]) -> None:
    """Records of tokens are those of one rank, in any layout, and the weights those of Equations 3 to 5."""
    files = ["step-00000005.parquet", "step-00000010.parquet", "step-00000012.parquet"]
    one = folder / "online one rank" / "tokens"
    assert sorted(path.name for path in one.iterdir()) == files
    for name in files:
        want = pq.read_table(one / name).to_pydict()
        assert set(want["step"]) == {int(name[5:13])}
        check_weights(want)
        for run in runs:
            got = pq.read_table(folder / run / "tokens" / name).to_pydict()
            check_weights(got)
            for key in ("step", "sample", "position", "token", "mask"):
                assert got[key] == want[key]
            # Random initial weights depend on how the model is cut; the reference is the same checkpoint everywhere.
            same_model = run in ("queued dp2", "queued cp2")
            for key in ("nll", "ref_nll", "weight") if same_model else ("ref_nll",):
                assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-3), f"{run} {name} {key}"


def check_weights(records: dict[str, list[Any]]) -> None:
    table = {key: np.array(values).reshape(3, SEQUENCE) for key, values in records.items()}
    assert (table["sample"] == np.arange(3)[:, None]).all()
    assert (table["position"] == np.arange(SEQUENCE)).all()
    assert 0 < (~table["mask"]).sum() < table["mask"].size
    gap = table["nll"].astype(np.float64) - table["ref_nll"]
    mean = np.array([g[m].mean() for g, m in zip(gap, table["mask"], strict=True)])[:, None]
    weight = np.clip(2 / (1 + np.exp(mean - gap)), 0.8, 1.2) * table["mask"]
    assert table["weight"] == pytest.approx(weight, abs=1e-6)
    assert weight[table["mask"]].std() > 0.01


def test_recipes(tmp_path: Path) -> None:
    """What a recipe may not ask of a queue, and the scorer's own layout."""
    refused = {
        "reference.scores and reference.queue: give one of them": {"reference": {"scores": "s"}},
        "reference.queue carries one number a token": {"objective": {"name": "kd"}},
        "logging.tokens_source = 'other' is not in data.eval": {"logging": {"tokens_source": "other"}},
        "reference.queue.timeout_s = 1 is not under watchdog.step_timeout_s = 1": {"watchdog": {"step_timeout_s": 1}},
    }
    for message, change in refused.items():
        recipe = queued(tmp_path, "refused")
        for section, values in change.items():
            recipe[section] = {**recipe.get(section, {}), **values}
        with pytest.raises(UserError, match=message):
            parse_recipe(recipe)
    recipe = queued(tmp_path, "layout", {"parallel": {"tensor": 4}, "microbatch_samples": 8}, parallel={"context": 2})
    run, scorer = parse_recipe(recipe), parse_recipe(recipe).for_scorer()
    assert (scorer.parallel.tensor, scorer.parallel.context, scorer.batch.microbatch_samples) == (4, 1, 8)
    assert scorer.fingerprint() == run.fingerprint()
    assert scorer.queue_folder == run.queue_folder == tmp_path / "layout" / "queue"
    recipe["reference"]["queue"]["parallel"] = {"sequence": True}
    with pytest.raises(UserError, match=r"reference\.queue: parallel\.sequence needs parallel\.tensor"):
        parse_recipe(recipe).for_scorer()


def test_devices_of_scorers() -> None:
    assert devices({}, 6, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert devices({"CUDA_VISIBLE_DEVICES": ""}, 2, 1) == {}
    assert devices({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 3, 1) == {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(UserError, match="names 4 devices only"):
        devices({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, 1)
