"""What the documentation shows runs, and gives what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import run_local

ROOT = Path(__file__).parents[1]


def code_block(page: str, language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{page} has {len(blocks)} blocks of {language}"
    return blocks[0]


def test_plugin_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The script trains, and two tensor-parallel ranks print what one prints (float32 sums in another order)."""
    script = tmp_path / "train.py"
    script.write_text(code_block("docs/plugin.md", "python"))
    losses = []
    for nproc in (1, 2):
        assert run_local([sys.executable, "-W", "ignore", str(script)], nproc) == 0
        losses.append([float(x) for x in re.findall(r"step \d+ nll ([\d.]+)", capfd.readouterr().out)])
    assert len(losses[0]) == 10
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=2e-5, abs=1e-6)


def test_makefile_has_the_targets_of_the_readme() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    for target in sorted(targets):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target
