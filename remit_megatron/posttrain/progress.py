"""What a stage shows while its engine runs: a bar on a terminal, plain lines elsewhere, from metrics.jsonl."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from remit_megatron.posttrain.contract import METRICS, StageSpec

SHOWN = ("loss", "reward", "correct", "response_tokens_per_s", "lr")
"""Figures of a line that are told, where they are there."""
EVERY_S = 10.0
"""Between two plain lines."""


class StageProgress:
    """Reads the lines that an engine adds to metrics.jsonl whenever it is told to look."""

    def __init__(self, folder: Path, spec: StageSpec):
        self._path, self._name = folder / METRICS, spec.name
        self._place = self._path.stat().st_size if self._path.exists() else 0
        self._bar: Progress | None = None
        self._said = 0.0
        self._last: dict[str, Any] | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}  {task.fields[info]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(spec.name, total=None, info="the engine starts")

    def __enter__(self) -> "StageProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.look()
        if self._bar is not None:
            self._bar.stop()
        elif self._last is not None:
            self._say(self._last)

    def look(self) -> None:
        """Show what has come since the last look; a line that is half written waits for the next one."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._place:  # cut to a checkpoint's step
            self._place = size
        if size == self._place:
            return
        with self._path.open("rb") as stream:
            stream.seek(self._place)
            whole = stream.read(size - self._place).rpartition(b"\n")[0]
        self._place += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            self._show(json.loads(line))

    def _show(self, line: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], total=line.get("steps"), info=_figures(line))
            return
        self._last = line
        if time.monotonic() - self._said > EVERY_S:
            self._say(line)

    def _say(self, line: dict[str, Any]) -> None:
        total = f"/{line['steps']}" if "steps" in line else ""
        print(f"{self._name}: step {line['step']}{total}  {_figures(line)}", file=sys.stderr, flush=True)
        self._said, self._last = time.monotonic(), None


def _figures(line: dict[str, Any]) -> str:
    return "  ".join(f"{key} {line[key]:.4g}" for key in SHOWN if isinstance(line.get(key), int | float))
