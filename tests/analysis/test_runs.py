"""Time to a baseline's quality, from metrics whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.analysis.runs import RunFigures, compare_runs, read_metrics, write_runs
from remit_megatron.cli import main
from remit_megatron.errors import UserError

METRIC = "eval/held/nll"


def write_run(folder: Path, values: dict[int, float], steps: int = 20, step_ms: float = 100.0, **more: Any) -> Path:
    """A run of 1,000 tokens a step on two ranks, with held-out NLL at some steps."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 1000 * step, "step_ms": 9000.0 if step == 1 else step_ms, "ranks": 2}
        line |= {"grad_norm": None if step == 2 else float(step), **more}
        if step in values:
            line[METRIC] = values[step]
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def compare(*runs: Path, metric: str = METRIC, target: float | None = None) -> list[RunFigures]:
    return compare_runs({run.name: read_metrics(run) for run in runs}, metric, target)[0]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "ntp", {5: 4.0, 10: 3.0, 15: 2.5, 20: 2.0}),
        write_run(tmp_path / "remit", {5: 1.9, 10: 1.8, 15: 2.1, 20: 1.5}, step_ms=125.0, score_ms=25.0),
        write_run(tmp_path / "worse", {10: 3.5, 20: 2.2}, step_ms=50.0),
    ]


def test_speedups(runs: list[Path]) -> None:
    ntp, remit, worse = compare(*runs)
    assert (ntp.reached_tokens, ntp.tokens_speedup, ntp.hours_speedup) == (20_000, 1.0, 1.0)
    assert (remit.reached_tokens, remit.tokens_speedup) == (5_000, 4.0)
    hours = [2 * (9000 + 19 * 100) / 3.6e6, 2 * (9000 + 4 * 125) / 3.6e6]
    assert remit.reached_device_hours == pytest.approx(hours[1])
    assert remit.hours_speedup == pytest.approx(hours[0] / hours[1])
    assert remit.steps_per_s_over_baseline == pytest.approx(0.8), "medians, so the first step does not count"
    assert remit.score_share == pytest.approx(0.2)
    assert (remit.final, remit.best) == (1.5, 1.5)
    assert (worse.reached_tokens, worse.tokens_speedup, worse.hours_speedup) == (None, None, None)
    assert worse.final == worse.best == 2.2
    assert ntp.grad_norm == pytest.approx({"0.05": 2.8, "0.5": 11.0, "0.95": 19.1})


def test_a_target_of_ones_own_and_accuracies(tmp_path: Path, runs: list[Path]) -> None:
    ntp, remit = compare(*runs[:2], target=2.5)
    assert (ntp.reached_tokens, remit.reached_tokens, remit.tokens_speedup) == (15_000, 5_000, 3.0)
    for name, at in (("a", {5: 0.1, 20: 0.3}), ("b", {5: 0.2, 10: 0.4, 20: 0.35})):
        folder = write_run(tmp_path / name, {})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        text = "".join(
            json.dumps(x | ({"eval/gsm8k/accuracy": at[x["step"]]} if x["step"] in at else {})) + "\n" for x in lines
        )
        (folder / "metrics.jsonl").write_text(text)
    a, b = compare(tmp_path / "a", tmp_path / "b", metric="eval/gsm8k/accuracy")
    assert (a.reached_tokens, b.reached_tokens, b.best) == (20_000, 10_000, 0.4), "higher is better"


def test_files_and_table(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["analyze", "runs", *map(str, runs), "--metric", METRIC, "--output", str(out)]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row] == ["run", "---", "ntp", "remit", "worse"]
    assert rows[3][1:5] == ["20,000", "1.5000", "5,000", "4.00x"]
    assert rows[4][3:7] == ["never", "-", "-", "-"]
    content = json.loads((out / "runs.json").read_text())
    assert (content["target"], content["better"]) == (2.0, "lower")
    assert [one["run"] for one in content["runs"]] == ["ntp", "remit", "worse"]
    assert content["runs"][1]["tokens_speedup"] == 4.0
    assert (out / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"ntp: no step has 'eval/other/nll'; .* in its metrics: eval/held/nll"):
        compare(*runs, metric="eval/other/nll")
    with pytest.raises(UserError, match="--metric eval/held/score: say with --better whether lower or higher"):
        compare(*runs, metric="eval/held/score")
    with pytest.raises(UserError, match="--target nan: a number is expected"):
        compare(*runs, target=float("nan"))
    with (runs[0] / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 21, "tok')
    assert read_metrics(runs[0])[-1]["step"] == 20, "a run may just be writing"
    for line in (
        '{"step": 1,',
        "[1, 2]",
        '{"tokens": 5}',
        '{"tokens": "5", "step_ms": 1.0}',
        '{"tokens": 5, "step_ms": 0}',
    ):
        (runs[1] / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "step_ms": 1.0}\n' + line + "\n")
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no valid JSON of a step .*: restore the file"):
            read_metrics(runs[1])
    out = tmp_path / "none"
    command = ["analyze", "runs", str(runs[0]), str(tmp_path / "absent"), "--metric", METRIC, "--output", str(out)]
    assert main(command) == 2
    assert "absent/metrics.jsonl: cannot be read" in capsys.readouterr().err
    assert not out.exists()


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a/run", {20: 2.0})
    other = write_run(tmp_path / "b/run", {20: 2.0})
    text = write_runs([one, other, tmp_path / "b/../a/run"], METRIC, tmp_path / "out")
    assert text.count("| 20,000 | 2.0000 |") == 2, "each run once"
    assert str(one) in text
    assert str(other) in text


def test_runs_that_do_not_say_their_ranks(runs: list[Path], tmp_path: Path) -> None:
    """Tokens are compared all the same, and no hours are made up."""
    path = runs[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"ranks": 2, ', "", 1))
    ntp, remit = compare(*runs[:2])
    assert (remit.tokens_speedup, remit.device_hours, remit.reached_device_hours, remit.hours_speedup) == (
        4.0,
        *[None] * 3,
    )
    assert ntp.hours_speedup == 1.0
    text = write_runs(runs, METRIC, tmp_path / "out")
    assert "does not say on how many ranks it ran: remit" in text


def test_names_that_pictures_and_tables_would_take_for_markup(tmp_path: Path) -> None:
    odd = write_run(tmp_path / "_a|$b$", {20: 2.0})
    text = write_runs([odd, write_run(tmp_path / "c", {20: 1.0})], METRIC, tmp_path / "out")
    assert r"| _a\|$b$ |" in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines * 10, 21),
        (lambda lines: lines[:5] + lines[9:], 6),
        (lambda lines: lines[3:], 1),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
    ],
)
def test_steps_that_are_not_all_there_once(tmp_path: Path, change: Any, line: int) -> None:
    """Ten copies of a file would make ten hours of one."""
    run = write_run(tmp_path / "run", {20: 1.5})
    path = run / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=f"line {line} is of step .*: restore the file"):
        read_metrics(run)
