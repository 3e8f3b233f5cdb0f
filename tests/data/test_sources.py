"""Datasets of one recipe against each other."""

import shutil
from pathlib import Path

import pytest

from data_prep.writer import write_dataset
from remit_megatron.data.manifest import quick_verify
from remit_megatron.data.sources import check_sources
from remit_megatron.errors import UserError


def test_sources_of_one_recipe(tmp_path: Path) -> None:
    """By content: a copy under another name is the same dataset, and so is a link."""
    for name, ids in (("a", [1, 2, 3]), ("b", [4, 5]), ("held", [6, 7, 8])):
        write_dataset(tmp_path / name, [ids], vocab_size=20, eod_id=9)
    for ending in (".bin", ".idx", ".manifest.json"):
        shutil.copy(tmp_path / f"a{ending}", tmp_path / f"copy{ending}")
        (tmp_path / f"link{ending}").symlink_to(tmp_path / f"held{ending}")
    info = {name: quick_verify(str(tmp_path / name)) for name in ("a", "b", "held", "copy", "link")}
    train, held = [info["a"], info["b"]], {"held": info["held"]}
    check_sources(train, held, None)
    check_sources(train, held, 9)
    with pytest.raises(UserError, match=r"data.train\[2\] \S+copy is the dataset of data.train\[0\] \S+a: its docu"):
        check_sources([*train, info["copy"]], held, None)
    with pytest.raises(UserError, match=r"data.eval.held \S+held is the dataset of data.train\[2\] \S+link: a run"):
        check_sources([*train, info["link"]], held, None)
    for sources, sets, key in ((train, held, r"data.train\[0\]"), ([], held, "data.eval.held")):
        with pytest.raises(UserError, match=rf"data.eod_id = 8, but \S+manifest.json of {key} says .* end with 9"):
            check_sources(sources, sets, 8)
