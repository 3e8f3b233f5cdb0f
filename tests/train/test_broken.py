"""What is broken is not called done: exit code 1 with the cause, no DONE, and nothing that was trained is lost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from data_prep.writer import write_dataset
from tests.ranks import run_ranks
from tests.train.runs import EOD, VOCAB, metrics, remit, settings, train_all

RARE = 55
"""A token that the held-out set has, and the training data do not."""
UNTIED = {"model": {"tied_embeddings": False}}


def run_broken(rank: int, folder: Path) -> dict[str, list[tuple[int, str]]]:
    """On one of two ranks: runs in which something is broken; (exit code, message) of each start of each."""
    import torch.distributed as dist

    if rank == 0:
        documents = [[1 + (i * j) % 50 for j in range(60)] for i in range(1, 200)]
        write_dataset(str(folder / "common"), documents, vocab_size=VOCAB, eod_id=EOD)
        write_dataset(str(folder / "rare"), [[1, RARE, 2] * 20] * 12, vocab_size=VOCAB, eod_id=EOD)
    dist.barrier()
    data = {"train": [{"path": str(folder / "common")}], "eval": {"held": str(folder / "rare")}}
    many, few = settings(folder, "many skipped"), settings(folder, "few skipped")
    once = settings(folder, "no update", schedule={"train_tokens": 128, "warmup_tokens": 0})
    outcomes = {
        "many skipped": train_all(rank, [many, many], [(1, [1, 4, 7]), (0, [])]),
        "few skipped": train_all(rank, [few, few], [(1, [4]), (0, [])]),
        "no update": train_all(rank, [once], [(0, [1])]),
        "evaluation": [train_poisoned(rank, settings(folder, "evaluation", data=data, **UNTIED), "student")],
        "reference": [train_poisoned(rank, remit(folder, "reference", optimizer={"max_bad_steps": 2}), "reference")],
    }
    outcomes["evaluation"] += train_all(rank, [settings(folder, "evaluation", data=data, **UNTIED)])
    return outcomes


def train_poisoned(rank: int, recipe: dict[str, Any], which: str) -> tuple[int, str]:
    """With a NaN in an embedding of the student or of the reference, on the last rank alone."""
    import torch
    import torch.distributed as dist

    from remit_megatron.config import parse_recipe
    from remit_megatron.errors import RemitError
    from remit_megatron.mcore import dist_checkpoint
    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.run.process import Process, StopSignals
    from remit_megatron.train.loop import start

    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    trainer = start(parse_recipe(recipe), process)
    try:
        reference = trainer.parts.reference
        chunks = trainer.parts.chunks if which == "student" else reference.chunks if reference else []
        if rank == size - 1:
            row = RARE if which == "student" else 7
            (embeddings,) = [p for name, p in chunks[0].named_parameters() if name.endswith("word_embeddings.weight")]
            embeddings.data[row, 3] = math.nan
        if reference:
            reference._checksum = dist_checkpoint.weights_checksum(reference.chunks)
        trainer.run(StopSignals())
        return 0, ""
    except RemitError as error:
        return error.exit_code, str(error)
    finally:
        trainer.close()
        dist.barrier()
        destroy_groups()


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[tuple[int, str]]]:
    first, second = run_ranks(2, run_broken, folder)
    assert first == second, "every rank says the same"
    return dict(first)


def test_many_skipped_steps(folder: Path, outcomes: Any) -> None:
    for code, message in outcomes["many skipped"]:
        assert code == 1
        assert "not done, though its last checkpoint is complete: 3 of 12 steps updated nothing" in message
        assert "(allowed: 10%)" in message
    run = folder / "many skipped"
    assert not (run / "DONE").exists()
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert json.loads((run / "status.json").read_text())["skipped_steps"] == 3
    assert "3 skipped" in (run / "log.txt").read_text()
    assert len(metrics(folder, "many skipped")) == 12


def test_few_skipped_steps(folder: Path, outcomes: Any) -> None:
    assert outcomes["few skipped"] == [(0, "")] * 2
    assert (folder / "few skipped" / "DONE").exists()


def test_no_update_at_all(folder: Path, outcomes: Any) -> None:
    ((code, message),) = outcomes["no update"]
    assert code == 1
    assert "no step updated the model" in message
    assert not (folder / "no update" / "DONE").exists()


def test_an_evaluation_that_is_no_number(folder: Path, outcomes: Any) -> None:
    """Also where the same command comes again, and no step is left to be trained."""
    for code, message in outcomes["evaluation"]:
        assert code == 1
        assert "the last evaluation is no number (eval/held/nll): the model is broken" in message
    assert not (folder / "evaluation" / "DONE").exists()
    lines = metrics(folder, "evaluation")
    assert [line["skipped"] for line in lines] == [0] * 12
    assert lines[-1]["eval/held/nll"] is None


def test_the_reference_is_named(folder: Path, outcomes: Any) -> None:
    ((code, message),) = outcomes["reference"]
    assert code == 1
    assert f"a weight of reference.path = '{folder / 'base'}' is broken" in message
    assert "peak_lr" not in message
    assert "the reference gives no number for" in (folder / "reference" / "log.txt").read_text()
    assert all(line["broken_scores"] > 0 for line in metrics(folder, "reference") if line["skipped"])


def reduced(rank: int) -> list[float]:
    import torch

    from remit_megatron.run.process import largest_of_ranks

    values = [(1.0, 2.0), (math.nan, 2.0), (2.0, math.nan), (math.nan, math.nan), (-3.0, -2.0), (math.inf, 1.0)]
    return [largest_of_ranks(torch.tensor(pair[rank])) for pair in values]


def test_a_nan_on_one_rank_is_not_hidden() -> None:
    for found in run_ranks(2, reduced):
        assert found[0] == 2.0
        assert all(math.isnan(value) for value in found[1:4])
        assert found[4:] == [-2.0, math.inf]
