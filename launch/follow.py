"""`remit launch --follow`: a submitted job's log, until it ends. Ending this ends nothing else."""

import subprocess
import sys
import time
from pathlib import Path

from launch.status import end_of, read_events, report

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


def follow(run: Path, jobs: list[str]) -> int:
    """Print rank 0's logs as they grow. Returns the run's exit code; 0 when interrupted, for the job goes on."""
    tails = [_Tail(run / "logs" / f"{job}.log") for job in jobs]
    seen: set[Path] = set()
    try:
        while True:
            # Asked first, so that nothing is missed that was written before the job left the queue.
            queued = _queued(jobs)
            for job in jobs:
                for log in sorted((run / "logs").glob(f"{job}.*/rank-0.log")):
                    if log not in seen:
                        seen.add(log)
                        tails.append(_Tail(log))
            for tail in tails:
                tail.copy()
            if not queued:
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; scancel {' '.join(jobs)} ends it", file=sys.stderr)
        return 0
    print(report(run))
    code = end_of(jobs, read_events(run))
    return 1 if code is None else code


def _queued(jobs: list[str]) -> bool:
    """Whether SLURM still has one of them to run or end."""
    result = subprocess.run(["squeue", "-h", "-j", ",".join(jobs), "-o", "%i"], capture_output=True, text=True)
    # An id that SLURM has forgotten makes it fail; a controller that does not answer, too, and that is not the end.
    return bool(result.stdout.strip()) or (result.returncode != 0 and "Invalid job id" not in result.stderr)
