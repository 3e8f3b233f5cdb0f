from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.runs import make_data, settings, train_all


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and a trained run `base` of another width, for references."""
    folder = tmp_path_factory.mktemp("runs")
    make_data(folder)
    base = settings(folder, "base", model={"hidden_size": 24, "tied_embeddings": False})
    assert run_ranks(1, train_all, [base]) == [[(0, "")]]
    return folder
