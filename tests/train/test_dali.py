"""A run on NVIDIA DALI's loader is the default loader's run, and says how long its steps waited."""

import json
from pathlib import Path

import pytest

from remit_megatron.optional import importable
from tests.ranks import run_ranks
from tests.train.runs import metrics, settings, train_all


@pytest.mark.skipif(not importable("nvidia.dali"), reason="NVIDIA DALI is not installed: pip install '.[dali]'")
def test_same_run_on_either_loader(folder: Path) -> None:
    recipes = [settings(folder, f"loader {name}", data={"loader": name}) for name in ("default", "dali")]
    assert run_ranks(2, train_all, recipes) == [[(0, "")] * 2] * 2
    assert metrics(folder, "loader dali") == metrics(folder, "loader default")
    for name in ("default", "dali"):
        lines = (folder / f"loader {name}" / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["data_ms"] >= 0 for line in lines)
