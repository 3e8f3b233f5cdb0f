"""benchmarks/gpu.sh: its refusal without a GPU, and its commands in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([ROOT / "benchmarks" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_refuses_without_a_gpu() -> None:
    done = run()
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    done = run("--rehearse", str(tmp_path))
    assert done.returncode == 0, done.stderr
    loss, step, fp8 = (json.loads((tmp_path / f"{name}_cpu.json").read_text()) for name in ("loss", "step", "step_fp8"))
    assert set(loss["errors_against_float64"]) == {
        "ours",
        "megatron unfused",
        "megatron fused",
        "compiled cross_entropy",
    }
    assert all("need a CUDA device" in reason for reason in loss["absent"].values())
    assert set(step["step_seconds"]) == {"ntp", "remit", "remit-scores"}
    assert set(fp8["ratios"]) == {"remit-fp8 over ntp"}
