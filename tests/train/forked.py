"""Many short training processes for the price of one import: `python -m tests.train.forked RUN.json KILLS`.

RUN.json holds a recipe. Both of its ranks are forked, and killed while they save; what is on disk then must be whole.
Prints, as JSON, how many kills came while a save was under way and what was wrong.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import remit_megatron.train.loop  # noqa: F401 - before the forks
from remit_megatron.data import checksums
from remit_megatron.errors import RemitError
from remit_megatron.processes import die_with_parent
from remit_megatron.run.checkpoint import CheckpointFolder, read_meta
from tests.train.runs import train_all

RANKS = 2


def fork_ranks(recipe: dict[str, Any], folder: str) -> list[int]:
    parent, pids = os.getpid(), []
    store = tempfile.mkdtemp(dir=folder)
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                die_with_parent(parent)
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo", store=dist.FileStore(f"{store}/store", RANKS), rank=rank, world_size=RANKS
                )
                code, message = train_all(rank, [recipe])[0]
                print(message, file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def wrong_on_disk(checkpoints: Path) -> list[str]:
    """The pointer's checkpoint is whole, and so is every folder with the name of a complete one."""
    try:
        latest = CheckpointFolder(checkpoints, keep=1).latest()
        complete = [path for path in checkpoints.glob("step-*") if (path / "meta.json").exists()]
        for path in complete:
            read_meta(path)
            found = checksums.problems(path, checksums.read(path), content=True)
            if found:
                return [f"{path.name}: {found[0]}"]
    except RemitError as error:
        return [str(error)]
    return [] if latest is not None or not complete else ["there are checkpoints, and none is the newest"]


def main(recipe: dict[str, Any], kills: int) -> dict[str, Any]:
    run, chance = Path(recipe["run"]), random.Random(7)
    during, wrong, done = 0, [], 0
    with tempfile.TemporaryDirectory() as folder:
        for kill in range(kills):
            recipe["checkpoint"]["asynchronous"] = kill % 3 == 2
            started_s = time.time()
            left = fork_ranks(recipe, folder)
            saves = chance.randint(0, 2)  # complete ones before the kill
            pause_s, begun = chance.uniform(0, 0.1), newest(run)
            while left and not (newest(run) >= begun + saves and is_saving(run, started_s)):
                left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
                time.sleep(0.001)
            time.sleep(pause_s)
            during += is_saving(run, started_s)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
            done += bool(left)
            wrong += wrong_on_disk(run / "checkpoints")
        recipe["checkpoint"]["asynchronous"] = False
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in fork_ranks(recipe, folder)]
    return {"kills": done, "during_saves": during, "wrong": wrong, "codes": codes}


def is_saving(run: Path, since_unix_s: float) -> bool:
    """Whether a save is under way that is no killed process's remainder."""
    try:
        return any(path.stat().st_mtime >= since_unix_s for path in (run / "checkpoints").glob(".partial-*"))
    except FileNotFoundError:  # it has just been renamed
        return False


def newest(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))))
