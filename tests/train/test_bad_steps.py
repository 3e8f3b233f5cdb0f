"""A gradient norm that is not finite, on one rank of two: all ranks skip together, count it, and stop after a while."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.runs import metrics, settings, train_all


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_skipped_then_stopped(folder: Path, distributed_optimizer: bool) -> None:
    layout = {"distributed_optimizer": distributed_optimizer}
    name = f"poisoned {distributed_optimizer}"
    recipe = settings(folder, name, parallel=layout, optimizer={"max_bad_steps": 3}, checkpoint={"every_steps": 2})
    outcomes = run_ranks(2, train_all, [recipe], {"rank": 1, "steps": [3, 4, 7, 8, 9, 10]})
    for ((code, message),) in outcomes:
        assert code == 1
        assert "3 steps in a row had a gradient norm that is not finite" in message
        assert "last at step 9" in message
    lines = metrics(folder, name)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [bool(line["skipped"]) for line in lines]
    # Skipped steps changed nothing, the others did: the loss falls over the run and is a number throughout.
    assert all(isinstance(line["loss"], float) for line in lines if not line["skipped"])
    assert lines[5]["loss"] < lines[0]["loss"]
    # A run that comes back knows how many it had skipped: the newest checkpoint is of step 8, two bad steps in.
    again = run_ranks(2, train_all, [recipe], {"rank": 0, "steps": [9]})
    assert all("3 steps in a row" in message for ((_, message),) in again)
