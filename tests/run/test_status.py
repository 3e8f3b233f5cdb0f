"""status.json and DONE, as whoever watches the run folder reads them, and without a run around them."""

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.errors import RunError, StopRequested
from remit_megatron.run.checkpoint import Meta
from remit_megatron.run.status import Status

KEYS = [
    "state",
    "step",
    "total_steps",
    "tokens",
    "loss",
    "tokens_per_s",
    "skipped_steps",
    "checkpoint_step",
    "exit_code",
    "reason",
    "updated_unix_s",
    "started_unix_s",
    "eta_s",
    "host",
    "job",
    "restart",
]


def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def line(step: int, loss: float | None = 2.5) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "loss": loss, "tokens_per_s": 50.0}


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Status:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    status = Status(tmp_path)
    status.open(10, Meta(shape={}, step=4, tokens=400))
    return status


def test_states(status: Status, tmp_path: Path) -> None:
    start = content(tmp_path)
    assert sorted(start) == sorted(KEYS)
    assert (start["state"], start["step"], start["tokens"], start["checkpoint_step"]) == ("starting", 4, 400, 4)
    assert (start["job"], start["restart"], start["exit_code"]) == ("77", 3, None)
    with status.outcome():
        status.stepped(line(5))
        assert content(tmp_path)["state"] == "running"
        status.stepped(line(6, None))
        status.saved(6)
        status.stepped({**line(6), "skipped": 1})
        status.saved(6)
        now = content(tmp_path)
        assert now["skipped_steps"] == 1
        status.stepped(line(6, None))
        status.saved(6)
        now = content(tmp_path)
        assert (now["step"], now["checkpoint_step"], now["tokens"], now["loss"]) == (6, 6, 600, None)
        assert now["eta_s"] >= 0
        status.done(10)
        assert (tmp_path / "DONE").read_text() == "step 10\n"
    assert (content(tmp_path)["state"], content(tmp_path)["exit_code"]) == ("done", 0)
    status.undone()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["status.json"], "nothing temporary is left"


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [(StopRequested("asked"), "stopped", 75), (RunError("disk\nfull"), "failed", 1), (KeyError("x"), "failed", 1)],
)
def test_an_error_is_the_reason(status: Status, tmp_path: Path, error: Exception, state: str, code: int) -> None:
    with pytest.raises(type(error)), status.outcome():
        raise error
    end = content(tmp_path)
    assert (end["state"], end["exit_code"]) == (state, code)
    assert "\n" not in end["reason"]
    assert end["reason"].split()[-1] in ("asked", r"disk\nfull", "'x'")


def test_a_hang_is_written_by_a_rank_that_does_not_own_the_status(status: Status, tmp_path: Path) -> None:
    status.stepped(line(7))
    other = Status(tmp_path)
    other.hung(86, "of another run")
    assert content(tmp_path)["state"] == "running", "not before the run folder is known to be its own"
    other.claimed()
    other.hung(86, "no step for 60 s")
    with pytest.raises(RunError), status.outcome():
        raise RunError("another rank is gone")
    end = content(tmp_path)
    assert (end["state"], end["exit_code"], end["step"], end["job"]) == ("hung", 86, 7, "77")


def test_a_failing_write_stops_nothing(status: Status, tmp_path: Path) -> None:
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with status.outcome():
        status.stepped(line(5))
        status.saved(5)


def test_ranks_that_never_open_it_write_nothing(tmp_path: Path) -> None:
    status = Status(tmp_path)
    with status.outcome():
        status.stepped(line(1))
        status.saved(1)
        status.done(1)
    assert not list(tmp_path.iterdir())
