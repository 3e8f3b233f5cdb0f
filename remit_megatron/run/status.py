"""status.json and DONE of a run folder: what a run does now, for whoever watches it from outside.

`{"state": "starting" | "running" | "stopped" | "done" | "failed" | "hung", "step", "total_steps", "tokens", "loss",
"tokens_per_s", "skipped_steps", "checkpoint_step", "exit_code", "reason", "updated_unix_s", "started_unix_s", "eta_s",
"host", "job", "restart"}`: null where a value is not known (yet). Written by rank 0; of a hang by any rank that sees
it.
"""

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import HangError, RemitError, StopRequested
from remit_megatron.run.checkpoint import Meta

SECONDS_BETWEEN_WRITES = 1.0
"""Of a state that stays; a change of state is written at once."""


class Status:
    """Does nothing before `open`; ranks that never open it only report a hang. A failing write stops nothing."""

    def __init__(self, run: Path):
        self.run = run
        self._lock = threading.Lock()
        self._fields: dict[str, Any] | None = None
        self._written_s = -math.inf
        self._first: tuple[int, float] | None = None
        self._warned = False
        self._ours = False

    def claimed(self) -> None:
        """On every rank: the run folder is this run's from now on, so that any of them may report a hang in it."""
        self._ours = True

    def logs(self) -> Path | None:
        """Where a rank may leave a file for people to read; None before `claimed`."""
        return self.run / "logs" if self._ours else None

    def open(self, total_steps: int, checkpoint: Meta | None) -> None:
        """On the rank that writes: say that the run starts, from `checkpoint` if there is one."""
        self._fields = {
            "state": "starting",
            "step": checkpoint.step if checkpoint else 0,
            "total_steps": total_steps,
            "tokens": checkpoint.tokens if checkpoint else 0,
            "loss": None,
            "tokens_per_s": None,
            "skipped_steps": (checkpoint.skipped or 0) if checkpoint else 0,
            "checkpoint_step": checkpoint.step if checkpoint else None,
            "exit_code": None,
            "reason": None,
            "started_unix_s": time.time(),
            "eta_s": None,
            **_whereabouts(),
        }
        self._write()

    def stepped(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl is complete."""
        if self._fields is None:
            return
        now = time.monotonic()
        starting = self._fields["state"] != "running"
        step = line["step"]
        if self._first is None:
            self._first = (step, now)
        first_step, first_s = self._first
        pace_s = (now - first_s) / (step - first_step) if step > first_step else None
        loss = line.get("loss")
        self._set(
            state="running",
            step=step,
            tokens=line["tokens"],
            loss=loss if loss is not None and math.isfinite(loss) else None,
            tokens_per_s=line["tokens_per_s"],
            skipped_steps=self._fields["skipped_steps"] + (line.get("skipped") or 0),
            eta_s=pace_s and pace_s * (self._fields["total_steps"] - step),
        )
        if starting or now - self._written_s >= SECONDS_BETWEEN_WRITES:
            self._write()

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        if self._fields is not None:
            self._set(checkpoint_step=step)
            self._write()

    def done(self, step: int) -> None:
        """The run is over and its last checkpoint complete: leaves DONE behind. Raises RunError if it cannot."""
        if self._fields is not None:
            write_atomically(self.run / "DONE", f"step {step}\n".encode())

    def undone(self) -> None:
        """The run goes on from before its end, because its last checkpoint is unusable."""
        if self._fields is not None:
            (self.run / "DONE").unlink(missing_ok=True)

    def hung(self, exit_code: int, reason: str) -> None:
        """For the thread that watches over the others, on any rank that has called `claimed`."""
        if not self._ours:
            return
        if self._fields is None:
            self._fields = _read(self.run / "status.json") or _whereabouts()
            if self._fields.get("state") == "hung":
                return
        self._end("hung", exit_code, reason)

    @contextlib.contextmanager
    def outcome(self) -> Iterator[None]:
        """Writes how the body ended; an exception passes through."""
        try:
            yield
        except StopRequested as error:
            self._end("stopped", error.exit_code, str(error))
            raise
        except HangError as error:
            self.hung(error.exit_code, str(error))
            raise
        except RemitError as error:
            self._end("failed", error.exit_code, str(error))
            raise
        except BaseException as error:
            self._end("failed", 1, f"{type(error).__name__}: {error}")
            raise
        self._end("done", 0, None)

    def _end(self, state: str, exit_code: int, reason: str | None) -> None:
        if self._fields is not None:
            if state == "failed" and self._said_to_hang():
                return  # another rank saw why this one failed
            line = " ".join(reason.split()) if reason else None
            self._set(state=state, exit_code=exit_code, reason=line, eta_s=0.0 if state == "done" else None)
            self._write()

    def _said_to_hang(self) -> bool:
        there = _read(self.run / "status.json") or {}
        keys = ("started_unix_s", "host", "job")
        return there.get("state") == "hung" and all(there.get(k) == (self._fields or {}).get(k) for k in keys)

    def _set(self, **fields: Any) -> None:
        assert self._fields is not None
        self._fields = {**self._fields, **fields}

    def _write(self) -> None:
        # A thread that hangs in this write must not hold up the one that reports the hang.
        held = self._lock.acquire(timeout=1.0)
        try:
            content = {**(self._fields or {}), "updated_unix_s": time.time()}
            # One name for each thread; no fsync: a status that a crash of the machine loses costs nothing.
            temporary = self.run / f".status.json.{threading.current_thread().name}"
            try:
                temporary.write_text(json.dumps(content, indent=1) + "\n")
                os.replace(temporary, self.run / "status.json")
            finally:
                temporary.unlink(missing_ok=True)
            self._written_s = time.monotonic()
        except OSError as error:
            if not self._warned:
                logging.getLogger(__name__).warning("status.json cannot be written: %s", error)
            self._warned = True
        finally:
            if held:
                self._lock.release()


def _whereabouts() -> dict[str, Any]:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return {
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(restart) if restart.isdecimal() else 0,
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
