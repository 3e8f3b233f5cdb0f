"""python -m tests.kills [--seed N] [--random N] [--points cheap|all] [--pairs N] [--hangs] [--only NAME ...]

Kills commands, each at N random moments or before each call that changes a folder, and starts pairs of them at once.
Afterwards the same command must end well, and with the same bytes as one that nobody has disturbed. Prints the seed and
counts, and what was wrong; exits with 1 where something was.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import secrets
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from remit_megatron.data import checksums
from remit_megatron.errors import HangError, RemitError
from remit_megatron.run.checkpoint import CheckpointFolder, read_meta
from tests.kills import jobs, zygote
from tests.kills.jobs import JOBS, OTHERS, PAIRS, Job, contents
from tests.kills.zygote import KILLED, Process, crash_points, fresh, random_moment, start

SHARES = {"merge": 3, "tokenize": 3, "select": 3, "import": 3, "export": 3, "score": 2, "train": 2}
"""Of random kills, so many of a job for one of the others."""
ALL = {**JOBS, **OTHERS}
PIPE_BYTES = 1 << 16


class Bench:
    """A folder with what every job starts from, and with what undisturbed ones leave."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.world = folder / "world"
        self.undisturbed: dict[str, dict[str, Any]] = {}

    def make(self) -> None:
        self.world.mkdir()
        jobs.make_world(self.world)

    def inputs(self, *names: str) -> Path:
        """A folder that holds what these jobs start from; made once."""
        folder = self.folder / "inputs" / " and ".join(names)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name} {os.getpid()}")
            for pattern in dict.fromkeys(pattern for name in names for pattern in ALL[name].inputs):
                for path in self.world.glob(pattern):
                    fresh_path(path, partial / path.name)
            with contextlib.suppress(OSError):  # another process was first
                partial.rename(folder)
        return folder

    def measure(self, name: str, scratch: Path) -> dict[str, Any]:
        """What an undisturbed job leaves, how long it takes, and its crash points."""
        folder, said, listed = scratch / "work", scratch / "said", scratch / "listed"
        fresh(self.inputs(name), folder)
        started = time.monotonic()
        other = self.beside(name, folder, scratch)
        code = self.start(name, folder, said, crash_points(folder, None, listed)).wait()
        assert code == 0, f"{name}, undisturbed, ends with {code}: {said.read_text()}"
        assert other is None or other.wait() == 0, f"beside {name}: {other.text()}"
        points = listed.read_text().splitlines() if listed.exists() else []
        return {"contents": contents(folder), "points": points, "duration_s": time.monotonic() - started}

    def start(self, name: str, folder: Path, said: Path, before: Callable[[], None] = lambda: None) -> Process:
        job = ALL[name]

        def prepare() -> None:
            job.prepare()
            before()

        return start(job.command, folder, said, job.ranks, prepare)

    def beside(self, name: str, folder: Path, scratch: Path) -> Process | None:
        command = ALL[name].beside
        return start(command, folder, scratch / "beside", before=ALL[name].prepare) if command else None


def fresh_path(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        fresh(source, target)
    else:
        target.write_bytes(source.read_bytes())


def kill_at_random(bench: Bench, name: str, seed: int, scratch: Path) -> str | None:
    """One to three kills before it is let through. What is wrong, or None."""
    generator = random.Random(f"{name} {seed}")
    folder, said = scratch / "work", scratch / "said"
    fresh(bench.inputs(name), folder)
    other = bench.beside(name, folder, scratch)
    duration_s = bench.undisturbed[name]["duration_s"]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        random_moment(bench.start(name, folder, said), generator, duration_s)
        if found := broken(bench, name, folder):
            return f"after the kill: {found}"
    return let_through(bench, name, folder, scratch, other)


def kill_at_point(bench: Bench, name: str, number: int, scratch: Path) -> str | None:
    folder, said = scratch / "work", scratch / "said"
    fresh(bench.inputs(name), folder)
    other = bench.beside(name, folder, scratch)
    code = bench.start(name, folder, said, crash_points(folder, number)).wait()
    if code not in (0, KILLED):  # what depends on time may come less often
        return f"ends with {code} in place of being killed: {said.read_text()}"
    if found := broken(bench, name, folder):
        return f"after the kill: {found}"
    return let_through(bench, name, folder, scratch, other)


def hang(bench: Bench, name: str, number: int, scratch: Path) -> str | None:
    """A scorer that comes no further is ended with the code of a hang, and says in what it hung."""
    folder, said = scratch / "work", scratch / "said"
    fresh(bench.inputs(name), folder)
    other = bench.beside(name, folder, scratch)
    code = bench.start(name, folder, said, jobs.hanging).wait()
    if other is not None:
        other.kill()
    wanted = {"score": "a block of scores took more than 1 s", "scorer": "no step for 1 s"}[name]
    return None if code == HangError.exit_code and wanted in said.read_text() else f"{code}: {said.read_text()[-800:]}"


def let_through(bench: Bench, name: str, folder: Path, scratch: Path, other: Process | None) -> str | None:
    """The same command again, and what it leaves."""
    process = bench.start(name, folder, scratch / "said")
    code = process.wait()
    if code:
        return f"the same command again ends with {code}: {process.text()[-600:]}"
    if other is not None and (code := other.wait()):
        return f"the command beside it ends with {code}: {other.text()[-600:]}"
    if "Traceback" in process.text():
        return f"a traceback: {process.text()[-2000:]}"
    return difference(contents(folder), bench.undisturbed[name]["contents"])


def difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    gone, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(path for path in wanted.keys() & found.keys() if wanted[path] != found[path])
    parts = {"lost": gone, "left": more, "other bytes in": other}
    return "; ".join(f"{what} {', '.join(paths[:4])}" for what, paths in parts.items() if paths) or None


def broken(bench: Bench, name: str, folder: Path) -> str | None:
    """What of a killed command is neither whole nor absent."""
    job: Job = ALL[name]
    if job.appears and (folder / job.appears[0]).exists():
        wanted = bench.undisturbed[name]["contents"]
        found = contents(folder)
        names = [path for path in wanted if fnmatch(path, job.appears[1])]
        wrong = [path for path in names if found.get(path) != wanted[path]]
        return f"{job.appears[0]} is there, and not as it will be: {', '.join(wrong)}" if wrong else None
    checkpoints = folder / "run" / "checkpoints"
    try:
        latest = CheckpointFolder(checkpoints, keep=1).latest()
        for path in (one for one in checkpoints.glob("step-*") if (one / "meta.json").exists()):
            read_meta(path)
            if problems := checksums.problems(path, checksums.read(path), content=True):
                return f"{path.name}: {problems[0]}"
    except RemitError as error:
        return str(error)
    complete = any(checkpoints.glob("step-*/meta.json"))
    return "there are checkpoints, and none is the newest" if complete and latest is None else None


def two_at_once(bench: Bench, names: tuple[str, str], seed: int, scratch: Path) -> str | None:
    """One wins and the other says so, or both share the work; then each again, which changes nothing."""
    generator = random.Random(f"{names} {seed}")
    folder = scratch / "work"
    fresh(bench.inputs(*dict.fromkeys(names)), folder)
    inputs = contents(folder)
    other = bench.beside(names[0], folder, scratch)
    first = bench.start(names[0], folder, scratch / "first")
    time.sleep(generator.uniform(0, min(1.0, 1.1 * bench.undisturbed[names[0]]["duration_s"])))
    second = bench.start(names[1], folder, scratch / "second")
    codes = first.wait(), second.wait()
    for process in (first, second):
        last = process.text().rstrip().rpartition("\n")[2]
        if "Traceback" in process.text() or process.code not in (0, 2):
            return f"ends with {process.code}: {process.text()[-2000:]}"
        if process.code == 2 and not last.startswith("remit: "):
            return f"says not in one line why it ends with 2: {process.text()[-600:]}"
    if 0 not in codes:
        return f"neither was done: {first.text()[-400:]} {second.text()[-400:]}"
    if other is not None and other.wait():
        return f"the command beside them ends with {other.code}: {other.text()[-600:]}"
    won = [name for name, code in zip(names, codes, strict=True) if code == 0]
    return difference(contents(folder), expected(bench, won, inputs))


def expected(bench: Bench, won: Sequence[str], inputs: dict[str, str]) -> dict[str, str]:
    """Of commands that all did their work: the files of each, beside the inputs."""
    files = dict(inputs)
    for name in won:
        files |= bench.undisturbed[name]["contents"]
    return files


def spread(tasks: Sequence[Any], act: Callable[[Any, Path], Any], folder: Path, processes: int) -> list[Any]:
    """`act(task, scratch)` of every task, in the order of the tasks; shared out over forks of this process."""
    assert len(tasks) <= PIPE_BYTES // 4, "more tasks than a pipe holds"
    read, write = os.pipe()
    os.write(write, b"".join(number.to_bytes(4, "little") for number in range(len(tasks))))
    os.close(write)
    pids = []
    for worker in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                zygote.die_with_parent()
                scratch = folder / f"worker-{worker}"
                scratch.mkdir(exist_ok=True)
                with (folder / f"outcomes-{worker}").open("w") as stream:
                    while taken := os.read(read, 4):  # whoever is free takes the next
                        number = int.from_bytes(taken, "little")
                        for path in scratch.glob("*"):
                            if path.is_file():
                                path.unlink()
                        outcome = _tried(act, tasks[number], scratch)
                        if isinstance(outcome, str):
                            print(f"{tasks[number]}: {outcome}", file=sys.stderr, flush=True)
                        stream.write(json.dumps([number, outcome]) + "\n")
                        stream.flush()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(read)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids), "a worker has died"
    lines = [line for worker in range(processes) for line in (folder / f"outcomes-{worker}").read_text().splitlines()]
    return [outcome for _, outcome in sorted(map(json.loads, lines), key=lambda pair: pair[0])]


def _tried(act: Callable[[Any, Path], Any], task: Any, scratch: Path) -> Any:
    try:
        return act(task, scratch)
    except AssertionError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - of the harness: shown with the task
        return traceback.format_exc()


KINDS: dict[str, Callable[..., str | None]] = {
    "random": kill_at_random,
    "point": kill_at_point,
    "pair": two_at_once,
    "hang": hang,
}


def shares(names: Sequence[str], count: int, seed: int) -> list[tuple[str, str, int]]:
    """`count` random kills, shared out over the jobs."""
    turn = [name for name in names for _ in range(SHARES.get(name, 1))]
    random.Random(seed).shuffle(turn)
    return [("random", turn[k % len(turn)], seed + k) for k in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="kills at random moments, over all jobs")
    parser.add_argument("--points", choices=("none", "cheap", "all"), default="none")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="starts of each pair")
    parser.add_argument("--hangs", action="store_true", help="that a scorer which hangs is ended")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=sorted(JOBS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    gc.freeze()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        bench = Bench(Path(scratch))
        bench.make()
        chosen = {*arguments.only, *OTHERS}
        pairs = [pair for pair in PAIRS if arguments.pairs and set(pair) <= chosen]
        names = list(dict.fromkeys([*arguments.only, *(name for pair in pairs for name in pair)]))
        measured = spread(names, bench.measure, Path(scratch), arguments.processes)
        assert all(isinstance(one, dict) for one in measured), measured
        bench.undisturbed = dict(zip(names, measured, strict=True))
        tasks: list[tuple[str, Any, int]] = shares(arguments.only, arguments.random, seed)
        for name in arguments.only:
            if arguments.points == "all" or (arguments.points == "cheap" and ALL[name].cheap):
                tasks += [("point", name, n + 1) for n in range(len(bench.undisturbed[name]["points"]))]
        tasks += [("hang", name, 0) for name in ("score", "scorer") if arguments.hangs]
        tasks += [("pair", pair, seed + k) for k in range(arguments.pairs) for pair in pairs]

        def act(task: tuple[str, Any, int], scratch: Path) -> str | None:
            kind, name, number = task
            return KINDS[kind](bench, name, number, scratch)

        outcomes = spread(tasks, act, Path(scratch), arguments.processes)
        return report(bench, tasks, outcomes, time.monotonic() - started)


def report(bench: Bench, tasks: Sequence[tuple[str, Any, int]], outcomes: Sequence[str | None], took_s: float) -> int:
    counts = Counter(f"{kind} {' + '.join(name) if kind == 'pair' else name}" for kind, name, _ in tasks)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    wrong = [(task, found) for task, found in zip(tasks, outcomes, strict=True) if found]
    for (kind, name, number), found in wrong:
        point = f" ({bench.undisturbed[name]['points'][number - 1]})" if kind == "point" else ""
        print(f"WRONG {kind} {name} {number}{point}: {found}")
    kinds = Counter(kind for kind, _, _ in tasks)
    done = (
        f"{kinds['random']} random kills, {kinds['point']} crash points, {kinds['pair']} pairs, {kinds['hang']} hangs"
    )
    print(f"{done} in {took_s:.0f} s: {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # some libraries complain at length when an interpreter that imported them ends
