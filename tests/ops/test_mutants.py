"""The mutation list stays applicable: a breakage whose text is gone would test nothing."""

from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant, apply, copy_to


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    copy_to(folder)
    return folder


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_applies_and_still_compiles(mutant: Mutant, copy: Path) -> None:
    path = copy / "remit_megatron" / mutant.file
    whole = path.read_text()
    apply(mutant, copy)
    broken = path.read_text()
    path.write_text(whole)
    assert broken != whole
    compile(broken, str(path), "exec")


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
