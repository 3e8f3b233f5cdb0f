"""Output into a reader that goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.writer import write_dataset
from remit_megatron.processes import READER_GONE, while_read

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["remit_megatron.cli", "data_prep.cli"])
@pytest.mark.parametrize("arguments", ["--help", "data stats dataset", "data verify dataset", "data stats none"])
def test_output_that_nobody_reads(module: str, arguments: str, tmp_path: Path) -> None:
    """Before a word is written: no traceback, neither from the command nor when the interpreter ends."""
    write_dataset(tmp_path / "dataset", [[1, 2]], vocab_size=9, append_eod=False)
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    os.close(writer)
    # argparse lets go of its help by itself.
    assert done.returncode in {"--help": (0, READER_GONE), "data stats none": (2,)}.get(arguments, (READER_GONE,))
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_another_broken_pipe_is_an_error() -> None:
    def action() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        while_read(action)
    assert while_read(lambda: 7) == 7
