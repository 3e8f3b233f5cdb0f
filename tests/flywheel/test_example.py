"""The small wheel of examples/flywheel, and every command of docs/flywheel.md, with a few steps of everything."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from remit_megatron.cli import build_parser
from remit_megatron.flywheel.config import Wheel, with_tuples
from tests.test_docs import blocks, commands

ROOT = Path(__file__).parents[2]
FEW = {
    "mid.set": '{"schedule.train_tokens" = 2048, "schedule.warmup_tokens" = 0}',
    "sft.save_every_steps": "1",
    "rl.steps": "2",
    "rl.batch_samples": "8",
    "rl.microbatch_samples": "8",
    "rl.completions": "4",
    "rl.max_completion_tokens": "8",
    "rl.must_stop": "false",
    "rl.keep": "[0.5]",
    "benchmarks.held_out.after": '["rl"]',
}


def run(folder: Path, words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pages_wheel() -> None:
    """Is one that the program takes."""
    (text,) = blocks("docs/flywheel.md", "toml")
    wheel = Wheel.model_validate(with_tuples(tomllib.loads(text)))
    assert list(wheel.stages) == ["sft", "rl"]


def test_commands_of_the_page(tmp_path: Path) -> None:
    """base, NTP, SFT, DPO, RLVR, ReMiT, SFT, DPO, RLVR, ReMiT squared, by TRL; a cluster's lines are parsed only."""
    pytest.importorskip("trl", reason="post-training's engine is not installed: pip install -e '.[post]'")
    make, *lines = commands("docs/flywheel.md")
    assert make == ["make", "flywheel"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    few = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]
    said: dict[str, str] = {}
    for words in lines:
        if words[0].endswith("python"):
            run(tmp_path, [sys.executable, *words[1:], "--quick"])
        elif "--on" in words:
            build_parser().parse_args(words[1:])
        else:
            said[words[2]] = run(
                tmp_path, [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *words[1:], *few]
            )
    page = (tmp_path / "runs/flywheel/wheel/report.html").read_text()
    for title in ("SFT: training loss", "DPO: training loss", "RL: verifiable correct rate", "RL: response length"):
        assert f">{title}</text>" in page
    names = ["r0-mid", "r0-sft", "r0-dpo", "r0-rl", "r1-remit-mid", "r1-remit-sft", "r1-remit-dpo", "r1-remit-rl"]
    for name in [*names, "r2-remit-mid", "r1-remit-rl-held_out"]:
        assert re.search(rf"^{name} +done ", said["status"], re.MULTILINE), said["status"]


def test_makefile() -> None:
    """`make flywheel` is the page's lines."""
    text = (ROOT / "Makefile").read_text().partition("\nflywheel: setup\n")[2].partition("\n\n")[0]
    made = [line.split()[1:] for line in text.splitlines()[1:]]
    assert made == [words[1:] for words in commands("docs/flywheel.md")[1:5]]
