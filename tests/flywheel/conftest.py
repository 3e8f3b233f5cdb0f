"""One finished wheel for all tests of a file: its mid-training takes most of the time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flywheel import wheels


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel of one round that ran undisturbed."""
    root = tmp_path_factory.mktemp("finished")
    wheels.remit(wheels.make_files(root), "run")
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the finished wheel, with its files, that a test may change."""

    def copy() -> Path:
        root = tmp_path / "copy"
        shutil.copytree(finished, root, symlinks=True)
        recipe = root / "mid.toml"
        recipe.write_text(recipe.read_text().replace(str(finished), str(root)))
        record = root / "wheel" / "wheel.json"
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "file": str(root / "wheel.toml")}))
        wheels.write_wheel(root, wheels.settings(root))
        return root

    return copy
