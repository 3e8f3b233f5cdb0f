"""A checkpoint goes on under another Megatron-Core, and another Python, both ways.

OTHER_PYTHON names the other interpreter, with the packages that this package needs; `make test-newest` and
`make test-python` set it. In the same layout every figure is the same to the bit; in another, and on another build of
torch (whose matrix products may differ), to the round-off that tests/train/test_resume.py allows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import make_data, metrics, remit, settings
from tests.train.test_resume import compare, from_step_6

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("OTHER_PYTHON", "")
PYTHONS = {"here": sys.executable, "there": OTHER}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},  # tied embeddings over stages: the optimizer has a bucket of its own for them
}

pytestmark = pytest.mark.skipif(not OTHER, reason="OTHER_PYTHON names no other interpreter: make test-newest")


def train(python: str, folder: Path, recipes: list[dict[str, Any]], ranks: int = 2) -> None:
    """In an interpreter of its own."""
    (folder / "job.json").write_text(json.dumps(recipes))
    command = [PYTHONS[python], "-W", "ignore", "-m", "tests.versions.part", str(ranks), str(folder / "job.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DEPRECATED" not in done.stderr + done.stdout


def ask(python: str, what: str) -> str:
    return subprocess.run([PYTHONS[python], "-c", what], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of twelve steps, each from the same base, by both interpreters: `PYTHON LAYOUT`."""
    folder = tmp_path_factory.mktemp("versions")
    make_data(folder)
    train("here", folder, [settings(folder, "base", model={"hidden_size": 24, "tied_embeddings": False})], ranks=1)
    for python in PYTHONS:
        train(python, folder, [remit(folder, f"{python} {name}", parallel=one) for name, one in LAYOUTS.items()])
    return folder


@pytest.fixture(scope="module")
def same_torch() -> bool:
    what = "import torch; print(torch.__version__)"
    return ask("here", what) == ask("there", what)


def test_the_versions_differ() -> None:
    what = "import sys, importlib.metadata as m; print(sys.version_info[:2], m.version('megatron-core'))"
    assert ask("here", what) != ask("there", what)


@pytest.mark.parametrize("reader", PYTHONS)
def test_a_checkpoint_goes_on(reader: str, folder: Path, same_torch: bool) -> None:
    """Written by one, gone on with by the other, in its own layout and in the other one."""
    writer = "there" if reader == "here" else "here"
    pairs = [(written, read) for written in LAYOUTS for read in LAYOUTS]
    recipes = []
    for written, read in pairs:
        name = f"{written} to {read} by {reader}"
        from_step_6(folder, f"{writer} {written}", name)
        recipes.append(remit(folder, name, parallel=LAYOUTS[read]))
    train(reader, folder, recipes)
    for written, read in pairs:
        name, straight = f"{written} to {read} by {reader}", metrics(folder, f"{writer} {written}")
        compare(metrics(folder, name), straight, name)
        if written == read and same_torch:
            assert metrics(folder, name) == straight, name
