"""A progress bar over bytes, on stderr, and none where nobody looks."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteProgress:
    """`with ByteProgress(title, total_bytes) as bar: bar.update(done_bytes)`."""

    def __init__(self, title: str, total_bytes: int, quiet: bool = False):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        hidden = quiet or not sys.stderr.isatty()
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden)
        self._task = self._progress.add_task(title, total=total_bytes)

    def update(self, done_bytes: int) -> None:
        self._progress.update(self._task, completed=done_bytes)

    def __enter__(self) -> "ByteProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
