"""A gradient norm that is not finite, on one rank of two: all ranks skip together, count it, and stop after a while."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.runs import metrics, settings, train_all

KINDS = {"sharded": {"distributed_optimizer": True}, "replicated": {"distributed_optimizer": False}}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Of all runs, rank by rank; every run is data-parallel over two ranks."""
    plan: dict[str, tuple[dict[str, Any], tuple[int, list[int]]]] = {}
    for kind, parallel in KINDS.items():

        def recipe(name: str, every: int, kind: str = kind, parallel: Any = parallel) -> dict[str, Any]:
            optimizer = {"max_bad_steps": 3}
            return settings(
                folder, f"{kind} {name}", parallel=parallel, optimizer=optimizer, checkpoint={"every_steps": every}
            )

        plan[f"{kind} poisoned"] = recipe("poisoned", 2), (1, [3, 4, 7, 8, 9, 10])
        # The newest checkpoint is of step 8, two bad steps in: one more is one too many.
        plan[f"{kind} again"] = recipe("poisoned", 2), (0, [9])
        plan[f"{kind} first"] = recipe("first", 1), (1, [1])
        plan[f"{kind} straight"] = recipe("straight", 0), (0, [1])
    recipes, poisons = zip(*plan.values(), strict=True)
    ranks = run_ranks(2, train_all, list(recipes), list(poisons))
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(plan)}


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_then_stopped(folder: Path, outcomes: dict[str, Any], kind: str) -> None:
    for code, message in outcomes[f"{kind} poisoned"]:
        assert code == 1
        assert "3 steps in a row had a gradient norm that is not finite" in message
        assert "last at step 9" in message
    lines = metrics(folder, f"{kind} poisoned")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [bool(line["skipped"]) for line in lines]
    # Skipped steps changed nothing, the others did: the loss falls over the run and is a number throughout.
    assert all(isinstance(line["loss"], float) for line in lines)
    assert lines[5]["loss"] < lines[0]["loss"]
    assert all("3 steps in a row" in message for _, message in outcomes[f"{kind} again"])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_before_the_first_update(folder: Path, outcomes: dict[str, Any], kind: str) -> None:
    """The optimizer has no state yet when the first step is skipped and saved."""
    assert outcomes[f"{kind} first"] == outcomes[f"{kind} straight"] == [(0, "")] * 2
    assert metrics(folder, f"{kind} first") == metrics(folder, f"{kind} straight")
