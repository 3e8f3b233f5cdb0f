"""What a run leaves in its folder beside checkpoints: the recipe, metrics.jsonl, logs and status.json."""

import math
from collections.abc import Iterable

from remit_megatron.config import Recipe, dump_toml
from remit_megatron.run.checkpoint import Meta
from remit_megatron.run.folder import RunFolder
from remit_megatron.run.status import Status
from remit_megatron.train.hooks import Moment
from remit_megatron.train.loggers import Loggers
from remit_megatron.train.metrics import MetricsFile


class Outputs:
    """Rank 0 opens the files; on other ranks every method does nothing."""

    def __init__(self, status: Status):
        self.status = status
        self._metrics: MetricsFile | None = None
        self._loggers: Loggers | None = None

    def open(self, folder: RunFolder, recipe: Recipe, meta: Meta, first_lines: Iterable[str]) -> None:
        """On rank 0: write the recipe, and go on with the files from the step of `meta`. Raises RunError."""
        folder.write_recipe(dump_toml(recipe))
        if meta.step < recipe.train_steps:
            self.status.undone()
        self._metrics = MetricsFile(folder.path / "metrics.jsonl", meta.step)
        self._loggers = Loggers(folder.path, recipe, meta)
        for text in first_lines:
            self.say(text)
        if self._metrics.missing:
            self.say(
                f"warning: metrics.jsonl has no line of step {self._metrics.missing}: it was cut or removed since the "
                "checkpoint was written; curves and hours made of it lack these steps"
            )

    @property
    def identities(self) -> dict[str, str] | None:
        """What external loggers need to go on in the same run. None before `open`."""
        return self._loggers.identities if self._loggers else None

    def say(self, text: str) -> None:
        """A line of the log."""
        if self._loggers:
            self._loggers.progress.say(text)

    def write(self, moment: Moment) -> None:
        """As a hook: the step's line, for every reader."""
        if self._loggers and self._metrics:
            # JSON has no NaN: a step without a finite norm says null.
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in moment.line.items()}
            self._metrics.write(finite)
            self.status.stepped(finite)
            self._loggers.write({k: v if v is not None else float("nan") for k, v in finite.items()})

    def sync(self) -> None:
        """Make all lines survive a crash of the machine. Raises RunError where they cannot be written."""
        if self._metrics:
            self._metrics.sync()

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
        if self._loggers:
            self._loggers.close()
