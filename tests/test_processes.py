"""Output into a reader that goes."""

import subprocess
import sys
from pathlib import Path

import pytest

from remit_megatron.processes import READER_GONE, while_read

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["remit_megatron.cli", "data_prep.cli"])
@pytest.mark.parametrize("arguments", ["--help", "data tokenize --help", "data stats none"])
def test_output_that_nobody_reads(module: str, arguments: str) -> None:
    """Before a word is written: no traceback, neither from the command nor when the interpreter ends."""
    closed = f"exec 3>&1; ( sleep 0.1; {sys.executable} -m {module} {arguments}; echo $? >&3 ) | true"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) == (2 if "none" in arguments else READER_GONE)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_another_broken_pipe_is_an_error() -> None:
    def action() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        while_read(action)
    assert while_read(lambda: 7) == 7
