"""One Weights & Biases run made of metrics.jsonl: while it grows, in a process beside training, or afterwards.

Training only writes its file. Whatever wandb, its service or the network do to the process that follows the file, no
step waits for it, and `remit sync-wandb` can make the whole run again. The x-axis is `tokens`; wandb's own step is the
run's, so it is unique and rises over restarts: what an earlier start has logged already is not logged twice.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from remit_megatron.processes import STOP_SIGNALS

CLOSE_S = 20.0
"""How long the end of a start may wait for what is still to be written or sent."""
POLL_S = 0.5
CONNECT_S = 5.0
INIT_S = 30
Line = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which run, and what of metrics.jsonl goes there."""

    run: str
    """The run folder."""
    identity: str
    project: str
    mode: str
    """"online" or "offline"."""
    after_step: int = 0
    every_steps: int = 1
    last_step: int = 0
    """It is logged, whatever `every_steps` says, as are evaluations."""
    config: dict[str, Any] = field(default_factory=dict)


class WandbProcess:
    """The process that follows metrics.jsonl from `target.after_step` on. Nothing here raises or blocks a step."""

    def __init__(self, target: Target):
        self._run = target.run
        self._process: subprocess.Popen[bytes] | None = None
        # A job that is to stop is sent its signals with all its processes; this one has to see the end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.train.wandb_run"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(target)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            logging.getLogger(__name__).warning("wandb: %s", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Let it write the rest, for so long."""
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=CLOSE_S)
        except (subprocess.TimeoutExpired, OSError):
            self._process.kill()
            self._process.wait()
            _warn(f"not finished in {CLOSE_S:.0f} s: `remit sync-wandb {self._run}` makes the run from metrics.jsonl")


def main() -> int:
    """The process of WandbProcess: a Target on stdin, whose end is the end of the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    target = Target(**json.loads(sys.stdin.buffer.readline()))
    try:
        upload(target, sys.stdin.buffer)
    except Exception as error:  # noqa: BLE001 - whatever the service or its client does, one line says it
        _warn(f"{' '.join(str(error).split())[:300]}: `remit sync-wandb {target.run}` makes the run from metrics.jsonl")
        return 1
    return 0


def upload(target: Target, until_end_of: BinaryIO | None = None) -> str:
    """Log the lines of metrics.jsonl that are there and, up to the end of a stream, those to come. Returns wandb's
    folder. Raises what wandb raises."""
    import wandb

    run = _start(target)
    run.define_metric("*", step_metric="tokens")
    skipped = 0
    for line in _lines(Path(target.run) / "metrics.jsonl", until_end_of):
        step = line["step"]
        skipped += line.get("skipped") or 0
        evaluated = any(key.startswith("eval/") for key in line)
        due = step % target.every_steps == 0 or evaluated or step == target.last_step
        if step > target.after_step and due:
            values = {key: _value(wandb, value) for key, value in line.items()}
            run.log({**values, "skipped_steps": skipped}, step=step)
    folder = str(Path(run.dir).parent)
    run.finish()
    wandb.teardown()  # an offline run is on disk only once wandb's own process has ended
    return folder


def _value(wandb: Any, value: Any) -> Any:
    """A value of metrics.jsonl as wandb takes it: null is not a number, counts and edges are a histogram."""
    if isinstance(value, dict):
        return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
    return float("nan") if value is None else value


def _start(target: Target) -> Any:
    import wandb

    def init(mode: str) -> Any:
        return wandb.init(
            project=target.project,
            name=Path(target.run).name,
            id=target.identity,
            resume="allow" if mode == "online" else None,
            dir=target.run,
            mode="online" if mode == "online" else "offline",
            config=target.config,
            settings=wandb.Settings(init_timeout=INIT_S, console="off", silent=True),
        )

    if target.mode == "online":
        problem = _unreachable()
        if problem is None:
            try:
                return init("online")
            except Exception as error:  # noqa: BLE001 - no key, no network, no service: wandb has no common base
                problem = " ".join(str(error).split())[:200]
        _warn(f"{problem}: it is kept offline; `remit sync-wandb {target.run}` sends it later")
    return init("offline")


def _unreachable() -> str | None:
    """Why the service cannot be reached, asked before wandb asks and waits. A proxy answers for every service."""
    address = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if urllib.request.getproxies().get(address.scheme):
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_S).close()
    except OSError as error:
        return f"{address.hostname}:{port} cannot be reached: {error}"
    return None


def _lines(path: Path, until_end_of: BinaryIO | None) -> Iterator[Line]:
    """Complete lines. The file is read once more after the stream's end, for what came meanwhile."""
    rest = b""
    with path.open("rb") as stream:
        while True:
            ended = until_end_of is None or _at_end(until_end_of)
            *complete, rest = (rest + stream.read()).split(b"\n")
            yield from map(json.loads, complete)
            if ended:
                return


def _at_end(stream: BinaryIO) -> bool:
    """Whether a stream that nothing is written to has been closed; waits a moment for it."""
    readable, _, _ = select.select([stream], [], [], POLL_S)
    return bool(readable) and not stream.read(1)


def _warn(text: str) -> None:
    print(f"warning: wandb: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
