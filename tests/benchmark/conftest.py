from pathlib import Path

import pytest

from tests.benchmark import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model as a Hugging Face folder, to be read only."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "model", steps=0)
