"""Ends a run that makes no progress, with its stacks on disk: an idle cluster costs more than a restart.

Each rank watches itself, for a rank that is stopped or whose node is gone can say nothing: the ranks that wait for it
do. A thread notices the hang. Where a library call keeps Python's threads from running, an alarm does, which no code of
this process can hold up: the stacks are then in the rank's log, and death by SIGALRM takes the place of the exit code.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from remit_megatron.config import Watchdog as Limits
from remit_megatron.errors import HangError, LostRankError
from remit_megatron.run.status import Status

STDERR = 2
REPORT_S = 20.0
"""How long writing the stacks may take: the filesystem may be what hangs."""
GRACE_S = 5.0
"""Between a rank's report and its end: the others see the same hang a moment later, and its end would hide it."""


class Watchdog:
    """Watches one rank between `__enter__` and `__exit__`; one without limits does nothing."""

    def __init__(self, limits: Limits | None = None, status: Status | None = None):
        self.limits = limits or Limits(step_timeout_s=0)
        self.status = status
        self.rank = os.environ.get("RANK", "0")
        self._step: int | None = None
        self._phase: str | None = "the start"
        self._quiet_s = 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.limits.step_timeout_s:
            if not faulthandler.is_enabled():
                faulthandler.enable(STDERR)  # a crash, or an abort by NCCL, leaves its stacks in the log
            faulthandler.register(signal.SIGALRM, STDERR, all_threads=True, chain=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._enter(None, self._phase)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is not None:
            with self._changed:
                thread, self._thread = self._thread, None
                self._changed.notify()
            thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
        if isinstance(error, HangError | LostRankError):
            stacks = "".join(traceback.format_exception(error)) + _all_stacks()
            with contextlib.suppress(OSError):
                self._write_stacks(str(error), stacks)

    def stepped(self, step: int) -> None:
        """A step is complete; the next one has `step_timeout_s`."""
        self._enter(step, None)

    def ending(self) -> None:
        """The last step is behind: what is left has `slow_timeout_s`."""
        self._enter(self._step, "the end")

    @contextlib.contextmanager
    def slow(self, what: str) -> Iterator[None]:
        """The body has `slow_timeout_s`. what: for the message, such as "a checkpoint"."""
        before = self._phase
        self._enter(self._step, what)
        yield
        self._enter(self._step, before)

    def _enter(self, step: int | None, phase: str | None) -> None:
        with self._changed:
            self._step, self._phase, self._quiet_s = step, phase, 0.0
        if self._thread is not None:
            # Far enough behind the thread that it is never first, however busy the machine.
            signal.setitimer(signal.ITIMER_REAL, 2 * self._limit_s() + REPORT_S + GRACE_S)

    def _limit_s(self) -> int:
        """Seconds that the present phase may take."""
        step_s, slow_s = self.limits.step_timeout_s, self.limits.slow_timeout_s
        return step_s if self._phase is None else max(step_s, slow_s)

    def _watch(self) -> None:
        interval_s = min(1.0, self.limits.step_timeout_s / 10)
        last_s = time.monotonic()
        with self._changed:
            while self._thread is not None and self._quiet_s < self._limit_s():
                self._changed.wait(interval_s)
                now_s = time.monotonic()
                # Of a time in which this process was stopped itself, little counts: it could make no progress.
                self._quiet_s += min(now_s - last_s, 2 * interval_s)
                last_s = now_s
            if self._thread is None:
                return
            reason = self._reason()
        self._end(reason)

    def _reason(self) -> str:
        since = f"since step {self._step}" if self._step is not None else "and no step was complete"
        if self._phase is None:
            return f"no step for {self._limit_s()} s (watchdog.step_timeout_s), {since}"
        return f"{self._phase} took more than {self._limit_s()} s (watchdog.slow_timeout_s), {since}"

    def _end(self, reason: str) -> None:
        stacks = _all_stacks()
        writer = threading.Thread(target=self._report, args=(reason, stacks), name="hang report", daemon=True)
        writer.start()
        writer.join(REPORT_S)
        time.sleep(GRACE_S)
        os._exit(HangError.exit_code)

    def _report(self, reason: str, stacks: str) -> None:
        print(f"remit: rank {self.rank} hangs: {reason}\n{stacks}", file=sys.stderr, flush=True)
        if self.status is not None:
            self.status.hung(HangError.exit_code, f"rank {self.rank}: {reason}")
        self._write_stacks(reason, stacks)

    def _write_stacks(self, reason: str, stacks: str) -> None:
        folder = os.environ.get("REMIT_LOGS") or (self.status.logs() if self.status else None)
        if folder is None:
            return
        path = Path(folder) / f"rank-{self.rank}.stacks.txt"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {reason}\n{stacks}\n")


def _all_stacks() -> str:
    """Python stacks of all threads. Dumping holds the interpreter's lock, so it goes to memory, which never hangs."""
    descriptor = os.memfd_create("stacks") if hasattr(os, "memfd_create") else None
    with os.fdopen(descriptor, "w+b") if descriptor is not None else tempfile.TemporaryFile() as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read().decode(errors="replace")
