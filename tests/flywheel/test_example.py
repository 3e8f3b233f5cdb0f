"""The small wheel of examples/flywheel, and every command of docs/flywheel.md, with a few steps of everything."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from remit_megatron.cli import build_parser, main
from remit_megatron.flywheel.config import Wheel, with_tuples
from tests.test_docs import blocks, commands

ROOT = Path(__file__).parents[2]
REMIT = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]
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


def test_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """base, NTP, SFT, DPO, RLVR, ReMiT, SFT, DPO, RLVR, ReMiT squared, by TRL.

    Of the lines for a cluster those that submit are parsed, and tests/slurm submits wheels; the others run.
    """
    pytest.importorskip("trl", reason="post-training's engine is not installed: pip install -e '.[post]'")
    make, *lines = commands("docs/flywheel.md")
    assert make == ["make", "flywheel"]
    for folder in ("examples", "slurm"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    assert len(lines) == 4 + 10, "the small wheel, and ten lines to the first one on a cluster"
    monkeypatch.setenv("WANDB_API_KEY", "of the profile, whose secrets are filled in")
    few = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]
    said: dict[str, str] = {}
    for words in dict.fromkeys(map(tuple, lines)):
        if words[0] == "make":
            assert words == ("make", "setup")
        elif words[0] == "cp":
            run(tmp_path, list(words))
        elif words[0].endswith("python"):
            run(tmp_path, [sys.executable, *words[1:], "--quick"])
        elif "--on" in words and "--dry-run" not in words:
            assert build_parser().parse_args(words[1:]).on == "slurm:cluster.toml"
        elif words[3].startswith("examples/"):
            said[words[2]] = run(tmp_path, [*REMIT, *words[1:], *few])
        else:
            monkeypatch.chdir(tmp_path)
            assert main([*words[1:], *([] if "--on" in words else few)]) == 0
            said[f"{words[2]} of the copy"] = capsys.readouterr().out
    assert said["status of the copy"] == said["status"], "a wheel is known by its content, wherever its file lies"
    # Without the overrides every stage is another, with a benchmark after each and of the base.
    assert said["run of the copy"].count("\n#SBATCH --partition=gpu\n") == 25
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
