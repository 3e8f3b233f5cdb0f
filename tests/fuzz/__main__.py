"""python -m tests.fuzz [--seed N] [--inputs M] [--only NAME ...] [--show TARGET SEED FOLDER]

Breaks M inputs, shared out over the targets, on two processes; the seed is printed. Exits with 1 where one was not
answered as it should be, and shows the first of each target and kind.
"""

import argparse
import collections
import multiprocessing
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.framework import TARGETS, Outcome, break_into, run
from tests.fuzz.targets import load

SHARE = 50
"""Inputs that one process takes at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="targets; default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", nargs=3, metavar=("TARGET", "SEED", "FOLDER"), help="write one broken input")
    arguments = parser.parse_args()
    load()
    if arguments.show:
        name, seed, folder = arguments.show
        Path(folder).mkdir(parents=True)
        break_into(TARGETS[name], int(seed), Path(folder))
        return 0
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    names = arguments.only or sorted(TARGETS)
    print(f"seed {seed}: {arguments.inputs:,} inputs for {', '.join(names)}", flush=True)
    started = time.monotonic()
    outcomes = fuzz(names, seed, arguments.inputs, arguments.processes)
    print(report(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    print(
        f"{len(outcomes):,} inputs in {time.monotonic() - started:.0f} s, {len(wrong)} not answered as they should be"
    )
    return 1 if wrong else 0


def fuzz(names: list[str], seed: int, inputs: int, processes: int = 2) -> list[Outcome]:
    """Outcomes of broken inputs, shared out over targets; input k of a target has the seed `seed + k`."""
    each = -(-inputs // len(names))
    shares = [
        (name, range(seed + start, seed + min(start + SHARE, each)))
        for start in range(0, each, SHARE)
        for name in names
    ]
    if processes == 1:
        return [outcome for share in shares for outcome in _share(share)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return [outcome for share in pool.imap_unordered(_share, shares, 1) for outcome in share]


def _share(share: tuple[str, range]) -> list[Outcome]:
    name, seeds = share
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        return list(run(TARGETS[name], seeds, Path(scratch)))


def report(outcomes: list[Outcome]) -> str:
    """Counts by target, and the first wrong one of each kind with how to see it again."""
    lines = []
    for name in sorted({outcome.target for outcome in outcomes}):
        codes = collections.Counter(o.code for o in outcomes if o.target == name)
        counts = ", ".join(f"{count:,} with {code}" for code, count in sorted(codes.items()))
        lines.append(f"{name}: {counts}")
    shown: set[tuple[str, str]] = set()
    for outcome in outcomes:
        last = outcome.said.splitlines()[-1][:200] if outcome.said else ""
        kind = (outcome.target, f"{outcome.wrong} {last[:60]}")
        if outcome.wrong and kind not in shown:
            shown.add(kind)
            lines.append(f"WRONG {outcome.target}, seed {outcome.seed}: {outcome.wrong}; it said: {last}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
