"""A tiny random model of every family goes round the wheel, and what comes of RL can be used wherever a model is."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.hf.mapping import FAMILIES
from tests.flywheel import wheels

FIRST = ("llama", "olmo2", "smollm3", "youtu")
"""The paper's, and the plainest; the others go round with the slow tests."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return go_round(tmp_path_factory.mktemp("families"), *FIRST)


def go_round(folder: Path, *families: str) -> dict[str, Any]:
    line = [sys.executable, "-W", "ignore", "-m", "tests.flywheel.families", str(folder), *families]
    environment = wheels.environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=wheels.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


@pytest.mark.parametrize("family", FIRST)
def test_round_the_wheel(found: dict[str, Any], family: str) -> None:
    """Mid-training, SFT, RL; then the RL model guides `remit train`, transformers and lm_eval load it and agree, and
    every model of the wheel splits text as the base does."""
    check(found[family], family)


@pytest.mark.slow
def test_other_families(tmp_path: Path) -> None:
    others = sorted(FAMILIES.keys() - set(FIRST))
    found = go_round(tmp_path, *others)
    for family in others:
        check(found[family], family)


def check(one: dict[str, Any], family: str) -> None:
    stages = ["r0-mid", "r0-sft", "r0-rl", "r1-remit-mid"]
    assert {name: one["states"][name] for name in stages} == dict.fromkeys(stages, "done")
    assert len(one["ref_nll"]) == wheels.STEPS
    assert all(0 < value < 2 * math.log(61) for value in one["ref_nll"])
    assert one["architecture"] == FAMILIES[family].architecture
    # lm_eval sums float32 log-probabilities of three words; here they are float64.
    assert one["lm_eval"] == pytest.approx(one["transformers"], abs=1e-5)
    assert len(one["tokenizers"]) == 1
