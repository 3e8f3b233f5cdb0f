"""A run that was interrupted ends as if it had not been, bit for bit, and in another layout to round-off."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron.mcore.checkpoint_read import Reader
from tests.ranks import run_ranks
from tests.train.runs import metrics, remit, settings, train_all

TP2 = {"tensor": 2, "sequence": True}
OTHER_LAYOUTS = {
    "pp2": {"pipeline": 2},  # tied embeddings: the optimizer has a bucket of its own for them
    "pp2xvpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
    "dp2 overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


def from_step_6(folder: Path, run: str, copy: str) -> None:
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(folder / run, folder / copy)
    shutil.rmtree(folder / copy / "checkpoints" / "step-00000012")
    (folder / copy / "checkpoints" / "latest").write_text("step-00000006\n")
    for path in (folder / copy).glob("tokens/step-0000001*.parquet"):
        path.rename(path.with_stem("step-00000010"))  # recorded after the checkpoint, and due no more
    # The killed writer's last line may be incomplete.
    with (folder / copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "lo')


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[dict[str, Any]]:
    record = {"logging": {"tokens_every_steps": 4}}
    recipes = [
        remit(folder, "straight", parallel=TP2, **record),
        remit(folder, "straight pp2", parallel={"pipeline": 2}),
    ]
    assert run_ranks(2, train_all, recipes) == [[(0, "")] * 2] * 2
    return metrics(folder, "straight")


def test_resume(folder: Path, straight: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in straight] == list(range(1, 13))
    assert straight[11]["eval/held/nll"] < straight[0]["nll"] - 0.1, "it must have learned something"
    same = {"again": TP2, "asynchronous": TP2}
    for name in [*same, *OTHER_LAYOUTS]:
        from_step_6(folder, "straight", name)
    from_step_6(folder, "straight pp2", "pp2 to tp2")
    recipes = [
        remit(folder, "again", parallel=TP2, logging={"tokens_every_steps": 4}),
        remit(
            folder,
            "asynchronous",
            parallel=TP2,
            logging={"tokens_every_steps": 4},
            checkpoint={"asynchronous": True, "every_steps": 2},
        ),
        *(remit(folder, name, parallel=layout) for name, layout in OTHER_LAYOUTS.items()),
        remit(folder, "pp2 to tp2", parallel=TP2),
        remit(folder, "straight pp2", parallel={"pipeline": 2, "distributed_optimizer": False}),
    ]
    status = (folder / "straight pp2" / "status.json").read_bytes()
    for *done, (code, message) in run_ranks(2, train_all, recipes):
        assert done == [(0, "")] * (len(recipes) - 1)
        assert code == 2
        assert "its distributed_optimizer is True, this start has False" in message
    assert (folder / "straight pp2" / "status.json").read_bytes() == status, "a refused start writes nothing"

    for name in same:
        assert metrics(folder, name) == straight, name
        records = {path.name: path.read_bytes() for path in (folder / name / "tokens").iterdir()}
        assert sorted(records) == [f"step-{step:08d}.parquet" for step in (4, 8, 12)]
        assert records == {path.name: path.read_bytes() for path in (folder / "straight" / "tokens").iterdir()}
    checkpoints = folder / "asynchronous" / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000008", "step-00000010", "step-00000012"]
    assert (checkpoints / "latest").read_text() == "step-00000012\n"
    # Its description holds more than a synchronous save's, and is read all the same.
    assert Reader(checkpoints / "step-00000012").read_metadata().state_dict_metadata
    assert not list(checkpoints.glob(".partial-*"))
    unrecorded = [{key: value for key, value in line.items() if key != "token_weights"} for line in straight]
    for name in OTHER_LAYOUTS:
        compare(metrics(folder, name)[6:], unrecorded[6:], name)
    compare(metrics(folder, "pp2 to tp2"), metrics(folder, "straight pp2"), "pp2 to tp2")


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]], name: str) -> None:
    """To float32 round-off, grown over six updates; a lost or shifted optimizer state moves the loss by over 1e-3."""
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "nll", "ref_nll", "grad_norm", "weight_mean", "lr", "eval/held/nll"):
            if key in b:
                assert np.isclose(a[key], b[key], rtol=5e-5), f"{name} step {a['step']} {key}: {a[key]} for {b[key]}"


def test_states_of_other_parameters_are_refused(folder: Path) -> None:
    """Megatron-Core's fault that `align_optimizer_state` mends: without the mend a resume must not go on."""
    recipe = settings(folder, "shifted", parallel={"pipeline": 2})
    for first, second in run_ranks(2, resume_unaligned, recipe, folder / "shifted"):
        assert first == (0, "")
        assert second[0] == 1
        assert "the optimizer's weights are not the model's" in second[1]


def resume_unaligned(rank: int, recipe: dict[str, Any], run: Path) -> list[tuple[int, str]]:
    import torch.distributed as dist

    from remit_megatron.mcore import compat

    compat.align_optimizer_state = lambda optimizer: None
    outcomes = train_all(rank, [recipe])
    if rank == 0:
        shutil.rmtree(run / "checkpoints" / "step-00000012")
        (run / "checkpoints" / "latest").write_text("step-00000006\n")
    dist.barrier()
    return outcomes + train_all(rank, [recipe])
