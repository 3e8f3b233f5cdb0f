"""Progress by bytes with tokens a second and time left: a bar on a terminal, a line now and then in a log."""

import sys
import time
from typing import Any

from data_prep.worker import Progress

LINE_EVERY_S = 10.0


class Meter:
    """Counts what workers report. A context manager: the bar lives inside it."""

    def __init__(self, total_bytes: int, done: int = 0) -> None:
        """total_bytes: of all inputs on disk; done: of them, finished by an earlier start."""
        self.total_bytes = max(total_bytes, 1)
        self.first_bytes = done
        self.disk_bytes = done
        self.text_bytes = 0
        self.tokens = 0
        self.started = self._spoke = time.monotonic()
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> "Meter":
        self.started = self._spoke = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._row = self._bar.add_task("", total=self.total_bytes, completed=self.disk_bytes, rate="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, progress: Progress) -> None:
        """Count a report and show it."""
        self.disk_bytes += progress.disk_bytes
        self.text_bytes += progress.size
        self.tokens += progress.tokens
        if self._bar is not None:
            self._bar.update(self._row, completed=min(self.disk_bytes, self.total_bytes), rate=self._rate())
        elif time.monotonic() - self._spoke >= LINE_EVERY_S:
            self._spoke = time.monotonic()
            left = self._seconds_left()
            print(
                f"{100 * min(1.0, self.disk_bytes / self.total_bytes):.1f}% of {self.total_bytes / 1e6:,.0f} MB, "
                f"{self._rate()}, {f'{left:,.0f} s left' if left is not None else 'time left unknown'}",
                file=sys.stderr,
                flush=True,
            )

    def summary(self) -> str:
        """What this start did."""
        seconds = time.monotonic() - self.started
        return f"{self.text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s, {self._rate()}"

    def _rate(self) -> str:
        return f"{self.tokens / max(time.monotonic() - self.started, 1e-9) / 1e6:.2f} Mtok/s"

    def _seconds_left(self) -> float | None:
        passed = self.disk_bytes - self.first_bytes
        if passed <= 0:
            return None
        rate = passed / max(time.monotonic() - self.started, 1e-9)
        return max(0.0, (self.total_bytes - self.disk_bytes) / rate)
