"""benchmarks/loss.py runs: its arithmetic on CPU, and its refusal without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.loss", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_runs_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    shape = ["--tokens", "48", "--vocab", "256", "320", "--hidden", "16", "--chunk-tokens", "16", "--repeats", "3"]
    done = run("--device", "cpu", *shape, "--providers", "megatron unfused", "liger", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert "CPU" in report["machine"]["device"]
    assert set(report["absent"]) == {"liger"}
    assert set(report["errors_against_float64"]) == {"ours", "megatron unfused"}
    assert report["errors_against_float64"]["ours"]["gradient"] < 3e-3  # one rounding to 8 bits
    assert [shape["vocab"] for shape in report["shapes"]] == [256, 320]
    for shape in report["shapes"]:
        assert shape["milliseconds"]["whole loss"]["p25"] <= shape["milliseconds"]["whole loss"]["p75"]
        assert set(shape["ratios"]) == {
            "statistics / read",
            "gradient / read and write in place",
            "whole loss / copy",
            "megatron unfused / ours",
            "chunked head NLL / its product",
        }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_refuses_without_a_gpu() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device is present" in done.stderr
