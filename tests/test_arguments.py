"""What commands take as numbers, and what they say of anything else."""

import argparse

import pytest

from remit_megatron.arguments import count, positive, shard
from remit_megatron.cli import main


def test_numbers() -> None:
    assert (positive("1"), positive("007"), count("0"), shard("3/4")) == (1, 7, 0, (3, 4))


@pytest.mark.parametrize("text", ["", "x", "-1", "1.0", "1e3", "²", "٣", "+1", " 1"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number of at least 1"):
        positive(text)
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number of at least 0"):
        count(text)
    for one in (text, f"{text}/4", f"0/{text}"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no shard: write it as I/N"):
            shard(one)


@pytest.mark.parametrize("text", ["4/4", "0/0", "1/2/3", "/", "1"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no shard: write it as I/N"):
        shard(text)


def test_zero_is_not_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "recipe.toml", "--nproc", "0"])
    assert capsys.readouterr().err.endswith("error: argument --nproc: '0' is no whole number of at least 1\n")
