"""Keys of stages, which name the folders of finished ones, are those of the version that made them.

A key that changes makes every wheel's stages stale. A setting that comes later therefore goes into its section's
LATER, so that stages from before it stay done while it has its default.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from remit_megatron import toml
from remit_megatron.flywheel.config import Wheel, with_tuples
from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.graph import make_plan
from remit_megatron.posttrain.contract import SFT
from remit_megatron.sections import Section, without_later
from tests.train import runs

RECIPE = {
    "run": "unused",
    "data": {"sequence_length": 16, "train": [{"path": "train"}]},
    "batch": {"global_batch_tokens": 128},
    "optimizer": {"peak_lr": 1e-3},
    "schedule": {"train_tokens": 1024},
}
COMMON = {"peak_lr": 1e-3, "batch_samples": 4}
WHEEL = {
    "wheel": "wheel",
    "base": "base",
    "mid": {"recipe": "mid.toml"},
    "sft": {"data": ["rows"], "max_tokens": 16, **COMMON},
    "dpo": {"data": ["rows"], "max_tokens": 16, **COMMON},
    "rl": {"data": ["rows"], "steps": 10, "max_prompt_tokens": 8, "max_completion_tokens": 8, **COMMON}
    | {"completions": 2, "keep": [0.5]},
    "benchmarks": {"own": {"after": ["rl"], "command": ["true"]}, "suite": {"after": ["mid"], "suite": "base"}},
}
KEYS = {
    "r0-mid": "mid-99a51e7d8afa",
    "r0-mid-suite": "benchmark-b90ccc398eb3",
    "r0-sft": "sft-7f5340524dd7",
    "r0-dpo": "dpo-663019e2e9c0",
    "r0-rl": "rl-1b6fc1b74c54",
    "r0-rl-own": "benchmark-192f7f6abe52",
    "r1-remit-mid": "mid-9f33cd570938",
    "r1-remit-mid-suite": "benchmark-5405b156071f",
    "r1-remit-sft": "sft-44b0a09a6e1c",
    "r1-remit-dpo": "dpo-45af40c80e6c",
    "r1-remit-rl": "rl-3cd9f54f4629",
    "r1-remit-rl-own": "benchmark-ccb15c5f2487",
}
"""As the first version of the wheel made them."""


class Fixed(Contents):
    """Every file and every model has one content, whatever this machine's libraries write."""

    def file(self, path: Path, key: str) -> str:
        return "f" * 64

    def model(self, folder: Path, key: str) -> str:
        return "0" * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    runs.make_data(folder)
    (folder / "mid.toml").write_text(toml.dumps(RECIPE))
    return folder


def keys(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, str]:
    monkeypatch.chdir(folder)
    plan = make_plan(Wheel.model_validate(with_tuples(WHEEL | changes)), Fixed(folder / "contents.json"))
    return {name: f"{node.kind}-{node.key}" for node in plan.nodes for name in node.names}


def test_keys_are_those_of_the_first_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys(folder, monkeypatch) == KEYS


class LaterSFT(SFT):
    """As a version to come may have it."""

    LATER: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    label_smoothing: float = 0.0


class Outer(Section):
    sft: tuple[LaterSFT, ...]
    first: int = 1


def test_a_setting_that_came_later() -> None:
    """Is in what keys are made of where it is set, at any depth, and only there."""
    settings = {"max_tokens": 16, **COMMON}
    before = SFT(**settings).model_dump(mode="json")
    for later, more in (
        (LaterSFT(**settings), {}),
        (LaterSFT(**settings, label_smoothing=0.1), {"label_smoothing": 0.1}),
    ):
        outer = Outer(sft=(later,))
        found = without_later(outer, outer.model_dump(mode="json"))
        assert json.loads(json.dumps(found)) == {"sft": [before | more], "first": 1}
