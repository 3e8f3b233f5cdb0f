"""benchmarks/step.py runs: every arm on a tiny shape, and its refusal without a GPU. Not a measurement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.step import ARMS, SCORED, SHAPES
from benchmarks.step_figures import LIMITS, verdict
from remit_megatron.flops import training_flops_per_token

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_runs_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    sizes = ["--shape", "tiny", "--warmup", "1", "--pairs", "3"]
    arms = [arm for arm in ARMS if arm != "remit-graph"]
    done = run("--device", "cpu", *sizes, "--arms", *arms, "--output", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout)
    assert report["tokens_per_step"] == 64
    assert set(report["step_seconds"]) == set(arms)
    assert set(report["ratios"]) == {f"{arm} over ntp" for arm in arms if arm != "ntp"}
    assert set(report["reference_share"]) == set(SCORED) & set(arms), "the others score nothing"
    assert report["queue_wait_seconds"]["count"] == 3
    assert report["processor_time"].keys() == {
        *("step_seconds", "ratios", "reference_share"),
        *("scoring rate over ntp", "remit-scores and their scoring over ntp"),
    }
    assert report["processor_time"]["scoring rate over ntp"]["median"] > 1
    for spread in (*report["step_seconds"].values(), *report["reference_share"].values()):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["count"] == 3
    assert report["peak_bytes"]["process"] > 2**20
    assert "verdicts" not in report, "the limits are for other shapes"
    assert "ntp_mfu" not in report


def test_trainers_share_a_scorer(tmp_path: Path) -> None:
    """Two data-parallel ranks, and a scorer with the load of three; every arm two steps in a row."""
    sizes = ["--shape", "tiny", "--warmup", "1", "--pairs", "2", "--in-a-row", "2"]
    done = run(
        "--device", "cpu", *sizes, *["--trainers", "2", "--scored-trainers", "3", "--arms", "ntp", "remit-queued"]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["trainers"], report["scored_trainers"], report["tokens_per_step"]) == (2, 3, 128)
    assert report["ratios"]["remit-queued over ntp"]["count"] == 2
    assert report["queue_wait_seconds"]["count"] == 4, "every step's"
    done = run("--device", "cpu", *sizes, *["--trainers", "2", "--scored-trainers", "1"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "--trainers 2 --scored-trainers 1" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_refuses_without_a_gpu() -> None:
    done = run("--device", "cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch sees no CUDA device" in done.stderr


def test_verdicts() -> None:
    assert verdict(1.35, *LIMITS["remit over ntp"]) == {
        "value": 1.35,
        "must": "<= 1.37",
        "met": True,
        "aim": "<= 1.33",
        "aim_met": False,
    }
    assert "met" not in verdict(1.1, *LIMITS["remit-fp8 over ntp"])
    assert verdict(0.39, *LIMITS["ntp mfu"])["met"] is False


def test_flops_of_the_shape() -> None:
    """6 N + 12 L h s a token, N with the head and without the input embedding: OLMo-2-1B's published sizes."""
    layers = 16 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    expected = 6 * (layers + 100352 * 2048) + 12 * 16 * 2048 * 4096
    setting = SHAPES["olmo2-1b"]
    found = training_flops_per_token(setting["shape"], None, setting["sequence_length"])
    assert found == pytest.approx(expected, rel=1e-3)
