"""What a run that is done has to hold."""

from collections.abc import Callable
from typing import Any

from tests.slurm.jobs import STEPS, Run
from tests.train.runs import metrics

NewRun = Callable[..., Run]
Undisturbed = Callable[[int], list[dict[str, Any]]]


def lines(run: Run) -> list[dict[str, Any]]:
    return metrics(run.folder.parent, run.folder.name)


def check_done(run: Run, expected: list[dict[str, Any]]) -> None:
    """The run ended well, and every figure of every step is what it would have been without interruption."""
    assert (run.folder / "DONE").read_text() == f"step {STEPS}\n", run.story()
    assert (run.status["state"], run.status["exit_code"], run.status["step"]) == ("done", 0, STEPS)
    assert run.events[-1].name == "end"
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1)), "each step once, in order"
    assert lines(run) == expected
