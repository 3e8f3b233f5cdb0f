"""Types of command-line arguments, for argparse: each says what it takes where it is given something else."""

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isdecimal() and text.isascii() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not (text.isdecimal() and text.isascii()):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 0")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """I/N, counted from 0."""
    index, slash, shards = text.partition("/")
    digits = slash and (index + shards).isascii() and index.isdecimal() and shards.isdecimal()
    if not digits or int(index) >= int(shards):
        raise argparse.ArgumentTypeError(f"'{text}' is no shard: write it as I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(shards)
