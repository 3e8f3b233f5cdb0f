"""The whole smoke run in a few steps, as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quick_run_ends_with_table_results_and_plot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.smoke", "--quick", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [row["run"] for row in rows] == ["base", "reference", "ntp", "remit"]
    assert all(row["problems"] == 20 and row["nll_code"] > 0 and row["nll_arithmetic"] > 0 for row in rows)
    assert 0 < rows[3]["reference_share"] < 1
    assert rows[2]["tokens"] == rows[3]["tokens"]
    assert f"plot: {tmp_path / 'mid_training.png'}" in result.stdout
    steps = [json.loads(line) for line in (tmp_path / "remit" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(step["weight_mean"] - 1) < 0.2 for step in steps)
