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
