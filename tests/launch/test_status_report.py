"""`remit status`: what it says of a run folder, whatever state the folder is in."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import status
from launch.record import end_of, read_events
from launch.status import report
from remit_megatron.cli import main

NOW = 1_800_000_000.0
RUNNING: dict[str, Any] = {
    "state": "running",
    "step": 300,
    "total_steps": 1200,
    "tokens": 629_145_600,
    "loss": 2.34567,
    "tokens_per_s": 51_234.6,
    "checkpoint_step": 250,
    "exit_code": None,
    "reason": None,
    "started_unix_s": NOW - 4000,
    "updated_unix_s": NOW - 5,
    "eta_s": 90_061.0,
    "host": "gpu-17",
    "job": "77",
    "restart": 2,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "logs").mkdir()
    return tmp_path


def write(run: Path, events: list[tuple[int, str, str, int, str]] = [], **fields: Any) -> None:  # noqa: B006
    (run / "status.json").write_text(json.dumps(RUNNING | fields))
    write_events(run, events)


def write_events(run: Path, events: list[tuple[int, str, str, int, str]]) -> None:
    lines = ["\t".join(map(str, (int(NOW) + after, *rest))) for after, *rest in events]
    (run / "logs" / "events.tsv").write_text("".join(f"{line}\n" for line in lines))


def test_a_run_under_way(run: Path) -> None:
    write(
        run,
        [
            (-9000, "77.0", "start", -1, "on gpu-[16-17]"),
            (-7000, "77.0", "requeue", 100, "time limit"),
            (-6900, "77.1", "start", 100, "on gpu-[16-17]"),
            (-4000, "77.2", "start", 200, "on gpu-[16-17]"),
        ],
    )
    text = report(run, NOW)
    for line in (
        "state       running",
        "where       job 77.2 on gpu-17, last word 0:00:05 ago",
        "step        300 of 1,200 (25.0%), 629,145,600 tokens",
        "checkpoint  step 250",
        "loss        2.3457",
        "speed       51,235 tokens/s",
        "time left   1 d 1:01:01",
        "restarts    2",
    ):
        assert line in text.splitlines(), text
    first, second = text.splitlines()[-2:]
    assert first.endswith("77.1 from step 100: time limit")
    assert second.endswith("77.2 from step 200: lost without a word: a node, or killed")
    assert "no word for" not in text


def test_silence_is_remarked_on(run: Path) -> None:
    write(run, [(-4000, "77.2", "start", 200, "on gpu-17")], updated_unix_s=NOW - 700)
    assert f"no word for 0:11:40: see the newest folder of {run / 'logs'}" in report(run, NOW)
    write(run, [(-4000, "77.2", "start", 200, ""), (-600, "77.2", "end", 250, "failed")], updated_unix_s=NOW - 700)
    assert "no word for" not in report(run, NOW), "the job has said that it ended"


def test_before_the_first_step(run: Path) -> None:
    assert "state       has not started" in report(run, NOW)
    (run / "job.sbatch").write_text("")
    assert "state       waits for SLURM" in report(run, NOW)
    write_events(run, [(-10, "5.0", "start", -1, "on n0")])
    assert "state       starting: job 5.0" in report(run, NOW)


def test_an_end_that_no_rank_could_write(run: Path) -> None:
    write_events(run, [(-10, "5.0", "start", -1, "on n0")])
    assert status.main([str(run), "--failed", "no new checkpoint\nin 2 restarts"]) == 0
    assert "state       failed (exit code 1): no new checkpoint in 2 restarts" in report(run)
    write(run)
    assert status.main([str(run), "--failed", "given up"]) == 0
    content = json.loads((run / "status.json").read_text())
    assert (content["state"], content["step"], content["eta_s"]) == ("failed", 300, None)


def test_lines_that_a_full_disk_cut_are_left_out(run: Path) -> None:
    (run / "logs" / "events.tsv").write_text("17\t5.0\tstart\t-1\ton n0\n18\t5.0\tend\n\nx\t5.0\tstart\t1\ta\n")
    assert [event.name for event in read_events(run)] == ["start"]


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"remit: {tmp_path}: no run here: name the folder that a recipe's `run` names\n"


def test_a_start_that_ended_without_a_word_of_its_ranks(run: Path) -> None:
    """The newest event tells, and not what status.json was left with: running, or the end of an earlier start."""
    write(run, [(-4000, "77.2", "start", 200, ""), (-600, "77.2", "end", 250, "failed (exit code 1)")])
    lines = report(run, NOW).splitlines()
    assert lines[1:3] == [
        "state       ended: failed (exit code 1)",
        "job         77.2 end; its ranks had last said: running",
    ]
    events = [(-60, "78.0", "start", 300, "on n0"), (-50, "78.0", "requeue", 300, "preflight: n0")]
    write(run, events, state="done", exit_code=0)
    lines = report(run, NOW).splitlines()
    assert lines[1:3] == [
        "state       queued again: preflight: n0",
        "job         78.0 requeue; its ranks had last said: done",
    ]


def test_a_last_word_of_the_ranks_stays(run: Path) -> None:
    events = [(-4000, "77.2", "start", 200, ""), (-1, "77.2", "end", 300, "stopped on request (exit code 75)")]
    write(run, events, state="stopped", exit_code=75)
    lines = report(run, NOW).splitlines()
    assert lines[1] == "state       stopped (exit code 75)"
    assert "job         77.2 end: stopped on request (exit code 75)" in lines
    write(run, [*events, (0, "77.3", "start", 300, "")], state="stopped", exit_code=75)
    assert "state       stopped (exit code 75)" in report(run, NOW), "and nothing newer has ended"


def test_a_start_that_failed_before_any_status(run: Path) -> None:
    """`starting` is over once the job has said how it ended."""
    start = (-10, "5.0", "start", -1, "on n0")
    for name, says in (("end", "ended"), ("requeue", "queued again"), ("preempted", "preempted"), ("other", "other")):
        write_events(run, [start, (-5, "5.0", name, -1, "no such corpus, in rank-1.log")])
        assert report(run, NOW).splitlines()[1:3] == [
            f"state       {says}: no such corpus, in rank-1.log",
            f"job         5.0 {name}",
        ]


def test_the_exit_code_of_jobs(run: Path) -> None:
    """Of the last of them that has ended, whatever another job on this folder ended with."""
    write_events(
        run,
        [
            (1, "5.0", "start", -1, "on n0"),
            (2, "5.0", "requeue", -1, "hang (exit code 9)"),
            (3, "5.1", "end", -1, "time limit: link 1/2 hands over (exit code 0)"),
            (4, "6.0", "end", -1, "a mistake in recipe or input: x (exit code 2)"),
            (5, "55.0", "end", -1, "done (exit code 3)"),
            (6, "8.0", "end", -1, "cut by a full di"),
        ],
    )
    events = read_events(run)
    assert end_of(["5"], events) == 0
    assert end_of(["5", "6"], events) == 2
    assert end_of(["55"], events) == 3
    assert end_of(["7"], events) is None
    assert end_of(["8"], events) is None


def test_skipped_steps_are_counted(run: Path) -> None:
    write(run)
    assert "skipped  " not in report(run, NOW)
    lines = [json.dumps({"step": n, "loss": 1.0, "skipped": int(n in (3, 7))}) for n in range(1, 9)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '[1, "skipped"]', '{"step": 9, "skipped": 1']))
    text = report(run, NOW).splitlines()
    assert "skipped     2 steps, whose gradient norm was not finite, the last of them step 7" in text


def test_a_folder_full_of_nonsense_is_a_few_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that `remit status` reads is of the wrong kind, in turn: a line each, and never a traceback."""
    deep = "[" * 100_000 + "]" * 100_000
    many_digits = "9" * 5_000
    texts = {
        "status.json": [
            *(deep, f'{{"step": {many_digits}}}', '{"loss": NaN}', '{"eta_s": 1e300}', '{"updated_unix_s": -1}'),
            *('{"state": ["running"]}', '{"state": {}}', '{"restart": "x"}', '{"host": 3}', '{"step": true}'),
        ],
        "launch.json": [deep, "[]", '{"backend": 1}', '{"backend": "local"}', '{"jobs": []}', "\0"],
        "logs/events.tsv": [
            *(f"{many_digits}\t5.0\tstart\t1\ta", f"17\t5.0\tstart\t{many_digits}\ta", "\u00b2\t5\ta\t1\tb"),
            *("17\t5.0\tstart\t--5\ta", "\0", "\t\t\t\t"),
        ],
        "metrics.jsonl": [f'{deep}"skipped"', f'{{"skipped": {many_digits}}}', '{"skipped": [1]}', '"skipped"', "\0"],
    }
    for name, wrong in texts.items():
        for text in wrong:
            (run / name).write_text(text)
            assert main(["status", str(run)]) == 0, (name, text[:40])
            said = capsys.readouterr()
            assert said.err == ""
            assert len(said.out.splitlines()) <= 4, said.out
            if name.endswith(".json"):
                assert f"            {run / name}: is damaged: " in said.out, text[:40]
        (run / name).unlink()
        (run / name).mkdir()
        assert main(["status", str(run)]) == 0
        if name != "metrics.jsonl":
            assert f"            {run / name}: cannot be read: Is a directory" in capsys.readouterr().out
        (run / name).rmdir()


def test_what_is_told_stays_on_its_line(run: Path) -> None:
    """Nor does it reach the terminal as anything but text, or without end."""
    events = [(-9, "5.0", "start", -1, "on n0"), (-8, "5.0", "end", -1, "\x1b[2J" + "x" * 5_000)]
    write_events(run, events)
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": "a\nb\x1b[31m", "started_unix_s": NOW}))
    text = report(run, NOW)
    assert "state       failed: a b?[31m" in text.splitlines()
    (run / "status.json").unlink()
    assert max(len(line) for line in report(run, NOW).splitlines()) < 700
    assert "\x1b" not in report(run, NOW)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"step": "300"}', '{"total_steps": []}', '{"updated_unix_s": "now"}']
)
def test_a_damaged_status_is_a_remark(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the job itself wrote down is told all the same."""
    write_events(run, [(-9, "5.0", "start", -1, ""), (-8, "5.0", "requeue", -1, "hang"), (-7, "5.1", "start", -1, "")])
    (run / "status.json").write_text(text)
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "state       starting: job 5.1"
    assert said[2].startswith(f"            {run}/status.json: ")
    assert said[3] == "restarts    1"
    assert said[4].endswith("5.1 from the beginning: hang")


def test_a_status_without_fields(run: Path) -> None:
    (run / "status.json").write_text("{}")
    assert report(run, NOW).splitlines()[1] == "state       unknown"
    write(run, step=3, total_steps=None, tokens=None, loss=None, started_unix_s=None, updated_unix_s=None)
    assert "step        3 of 0, 0 tokens" in report(run, NOW)
