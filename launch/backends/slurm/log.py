"""`remit launch --follow`: a submitted job's log, until it ends. Ending this ends nothing else."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.backends.slurm import queue

POLL_S = 2.0


class _Tail:
    """Copies what is added to a file to stdout."""

    def __init__(self, path: Path):
        self.path = path
        self._at = 0

    def copy(self) -> None:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._at)
                added = stream.read()
        except OSError:
            return
        self._at += len(added)
        sys.stdout.write(added.decode(errors="replace"))
        sys.stdout.flush()


def show_until_the_end(run: Path, jobs: Sequence[str]) -> bool:
    """Print the jobs' logs and rank 0's as they grow. False: interrupted before the end, and the jobs go on."""
    tails = [_Tail(run / "logs" / f"{job}.log") for job in jobs]
    seen: set[Path] = set()
    try:
        while True:
            # Asked first, so that nothing is missed that was written before the job left the queue.
            there = queue.states(jobs)
            for job in jobs:
                for log in sorted((run / "logs").glob(f"{job}.*/rank-0.log")):
                    if log not in seen:
                        seen.add(log)
                        tails.append(_Tail(log))
            for tail in tails:
                tail.copy()
            if there == []:
                return True
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; scancel {' '.join(jobs)} ends it", file=sys.stderr)
        return False
