"""python -m tests.fuzz [--seed N] [--inputs M] [--only NAME ...] [--show TARGET SEED FOLDER]

Breaks M inputs, shared out over the targets, on two processes; the seed is printed. Exits with 1 where one was not
answered as it should be, and shows the first of each target and kind.
"""

import argparse
import collections
import gc
import math
import multiprocessing
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.framework import TARGETS, Outcome, break_into, ready, run
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
    gc.freeze()  # or every fork would copy what its collector looks at
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
    whole = sum(TARGETS[name].share for name in names)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        valid = {name: ready(TARGETS[name], Path(scratch)) for name in names}
        shares = []
        for name in names:
            count = math.ceil(inputs * TARGETS[name].share / whole)
            shares += [(name, range(seed + k, seed + min(k + SHARE, count))) for k in range(0, count, SHARE)]
        shares.sort(key=lambda share: share[1].start)

        def go(share: tuple[str, range]) -> list[Outcome]:
            return list(run(TARGETS[share[0]], share[1], valid[share[0]], Path(scratch)))

        if processes == 1:
            return [outcome for share in shares for outcome in go(share)]
        return _in_forks(go, shares, processes)


def _in_forks(
    go: Callable[[tuple[str, range]], list[Outcome]], shares: list[tuple[str, range]], processes: int
) -> list[Outcome]:
    with multiprocessing.get_context("fork").Pool(processes, _inherit, (go,)) as pool:
        return [outcome for found in pool.imap_unordered(_share, shares, 1) for outcome in found]


def _inherit(go: Callable[[tuple[str, range]], list[Outcome]]) -> None:
    global _go
    _go = go


def _share(share: tuple[str, range]) -> list[Outcome]:
    outcomes = _go(share)
    for outcome in outcomes:
        if outcome.wrong:
            print(f"{outcome.target}, seed {outcome.seed}: {outcome.wrong}", file=sys.stderr, flush=True)
    return outcomes


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
