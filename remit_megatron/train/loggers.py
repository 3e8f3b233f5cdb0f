"""Where metrics go besides metrics.jsonl: a progress line, log.txt, TensorBoard, Weights & Biases. Rank 0 only."""

import importlib.util
import logging
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from remit_megatron.config import Recipe
from remit_megatron.errors import UserError

Line = dict[str, Any]


class ProgressLog:
    """A bar with tokens/s, loss and time left on a terminal, plain lines elsewhere; log.txt in both cases."""

    def __init__(self, run: Path, recipe: Recipe, start_step: int):
        self.every = recipe.logging.every_steps
        self.total = recipe.train_steps
        self._started, self._start_step = time.monotonic(), start_step
        self._file = (run / "log.txt").open("a", buffering=1)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[info]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(run.name, total=self.total, completed=start_step, info="")
            self._bar.start()

    def say(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def write(self, line: Line) -> None:
        step = line["step"]
        info = f"loss {line.get('loss', float('nan')):.4f}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, info=info)
        if step % self.every == 0 or step == self.total:
            left = (time.monotonic() - self._started) / max(1, step - self._start_step) * (self.total - step)
            text = f"step {step}/{self.total}  {info}  {_more(line)}  left {_duration(left)}"
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            if self._bar is None:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()


def _more(line: Line) -> str:
    parts = [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.3f}", f"step {line['step_ms']:.0f} ms"]
    if "score_ms" in line:
        parts.append(f"reference {line['score_ms'] / line['step_ms']:.0%}")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts += [f"{key.removeprefix('eval/')} {value:.4f}" for key, value in line.items() if key.startswith("eval/")]
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class TensorBoardLog:
    """Scalars against steps, in `tensorboard/` of the run folder."""

    def __init__(self, run: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)

    def write(self, line: Line) -> None:
        for name, value in line.items():
            if name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """One Weights & Biases run, found again by an id that lives in the checkpoint. Its failures never stop training."""

    def __init__(self, run: Path, recipe: Recipe, identity: str | None):
        import wandb

        self.identity = identity or uuid.uuid4().hex[:8]
        self._wandb = wandb
        self._run: Any = None
        self._try(
            lambda: wandb.init(
                project=recipe.logging.wandb_project,
                name=run.name,
                id=self.identity,
                resume="allow",
                dir=str(run),
                mode="online" if recipe.logging.wandb == "online" else "offline",
                config=recipe.model_dump(),
                settings=wandb.Settings(init_timeout=30, console="off"),
            )
        )
        if self._run is not None:
            self._run.define_metric("*", step_metric="tokens")

    def _try(self, call: Any) -> None:
        try:
            self._run = call()
        except Exception as error:  # noqa: BLE001 - whatever the service or its client does, training goes on
            logging.getLogger(__name__).warning("wandb: %s", error)

    def write(self, line: Line) -> None:
        if self._run is None:
            return
        try:
            self._run.log(line, step=line["step"])
        except Exception as error:  # noqa: BLE001 - as above
            logging.getLogger(__name__).warning("wandb: %s", error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001 - as above
                logging.getLogger(__name__).warning("wandb: %s", error)


def check_loggers(recipe: Recipe) -> None:
    """Raise UserError for a logger that is asked for and not installed."""
    if recipe.logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb is on but wandb is not installed: pip install wandb, or set it to 'off'")


class Loggers:
    """All loggers of rank 0."""

    def __init__(self, run: Path, recipe: Recipe, start_step: int, identities: dict[str, str]):
        self.progress = ProgressLog(run, recipe, start_step)
        self.identities = dict(identities)
        self._external: list[Any] = []
        if recipe.logging.tensorboard:
            self._external.append(TensorBoardLog(run, start_step))
        if recipe.logging.wandb != "off":
            log = WandbLog(run, recipe, identities.get("wandb"))
            self.identities["wandb"] = log.identity
            self._external.append(log)
        self._every, self._total = recipe.logging.every_steps, recipe.train_steps

    def write(self, line: Line) -> None:
        self.progress.write(line)
        evaluated = any(key.startswith("eval/") for key in line)
        if line["step"] % self._every == 0 or evaluated or line["step"] == self._total:
            for log in self._external:
                log.write(line)

    def close(self) -> None:
        for log in self._external:
            log.close()
        self.progress.close()
