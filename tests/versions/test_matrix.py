"""The README's table of versions is what its script makes of the results that are kept."""

from tests.versions.matrix import README, table


def test_readme_has_the_table() -> None:
    assert table() in README.read_text(), "make matrix"
