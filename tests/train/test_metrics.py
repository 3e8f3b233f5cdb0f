"""metrics.jsonl at a restart: what belongs to the checkpoint stays, what came after it goes, damage is named."""

from pathlib import Path

import pytest

from remit_megatron.errors import UserError
from remit_megatron.train.metrics import MetricsFile

LINES = [f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3)]


@pytest.mark.parametrize("after", ["", LINES[2], "\0\0\0\n", '{"step": 3, "lo', "garbage\n" + LINES[2]])
def test_what_follows_the_checkpoint_goes(tmp_path: Path, after: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES[:2]) + after)
    file = MetricsFile(path, 2)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == "".join(LINES[:2]) + '{"step": 3}\n'


def test_damage_before_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0].encode() + b"\xff\xfe\n" + LINES[2].encode())
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2 is damaged"):
        MetricsFile(path, 3)
    assert path.read_bytes() == before
    MetricsFile(path, 0).close()
    assert path.read_bytes() == b""


CASES = {
    "cut": ([1, 2, 3], "4 to 9"),
    "gone": ([], "1 to 9"),
    "a gap": ([1, 2, 5, 6, 7, 9], "3 to 4, 8"),
    "no beginning": ([8, 9, 10], "1 to 7"),
    "a jump over the checkpoint": ([1, 12], "2 to 9"),
    "whole": ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], None),
}


@pytest.mark.parametrize("name", CASES)
def test_missing_steps_are_named(tmp_path: Path, name: str) -> None:
    steps, missing = CASES[name]
    path = tmp_path / "metrics.jsonl"
    if steps:
        path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    file = MetricsFile(path, 9)
    assert file.missing == missing
    file.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in steps if step <= 9)


@pytest.mark.parametrize(("steps", "line"), [([1, 2, 2, 3], 3), ([1, 3, 2], 3), ([0, 1], 1), ([1, 2, 3] * 2, 4)])
def test_steps_rise(tmp_path: Path, steps: list[int], line: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"line {line} is of step"):
        MetricsFile(path, 4)
    assert path.read_bytes() == before
