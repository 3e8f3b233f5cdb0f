"""Where metrics go besides metrics.jsonl: a progress line, log.txt, TensorBoard, Weights & Biases. Rank 0 only."""

import logging
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from remit_megatron.config import Recipe, load_recipe
from remit_megatron.errors import RunError, UserError
from remit_megatron.optional import check_wandb
from remit_megatron.run.checkpoint import CheckpointFolder, Meta, read_meta
from remit_megatron.train.wandb_run import Target, WandbProcess, upload

Line = dict[str, Any]


class ProgressLog:
    """A bar with tokens/s, loss and time left on a terminal, plain lines elsewhere; log.txt in both cases."""

    def __init__(self, run: Path, recipe: Recipe, start_step: int):
        self.every = recipe.logging.every_steps
        self.total = recipe.train_steps
        self._started, self._start_step = time.monotonic(), start_step
        self._path, self._warned = run / "log.txt", False
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
        self._keep(text)
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
            self._keep(text)
            if self._bar is None:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _keep(self, text: str) -> None:
        """A line of log.txt. A full disk costs lines, not the run."""
        try:
            with self._path.open("a") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            if not self._warned:
                logging.getLogger(__name__).warning("%s cannot be written: %s", self._path, error)
            self._warned = True


def _more(line: Line) -> str:
    parts = [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.3f}", f"step {line['step_ms']:.0f} ms"]
    if "score_ms" in line:
        parts.append(f"reference {line['score_ms'] / line['step_ms']:.0%}")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("skipped_steps"):
        parts.append(f"{line['skipped_steps']} skipped")
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
            if isinstance(value, dict):
                self._histogram(name, value, line["step"])
            elif name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, line["step"])

    def _histogram(self, name: str, histogram: dict[str, list[float]], step: int) -> None:
        """counts [n] and edges [n + 1]; of the values themselves only their bin is known, so sums take its middle."""
        counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


class Loggers:
    """All loggers of rank 0. None of them ever stops training."""

    def __init__(self, run: Path, recipe: Recipe, meta: Meta):
        """meta: where the run stands."""
        start_step = meta.step
        self.progress = ProgressLog(run, recipe, start_step)
        self.identities = dict(meta.loggers)
        self._skipped = meta.skipped or 0
        self._tensorboard: TensorBoardLog | None = None
        self._wandb: WandbProcess | None = None
        if recipe.logging.tensorboard:
            self._guarded(lambda: setattr(self, "_tensorboard", TensorBoardLog(run, start_step)))
        if recipe.logging.wandb != "off":
            self.identities.setdefault("wandb", uuid.uuid4().hex[:8])
            self._wandb = WandbProcess(wandb_target(run, recipe, self.identities["wandb"], after_step=start_step))
        self._every, self._total = recipe.logging.every_steps, recipe.train_steps

    def write(self, line: Line) -> None:
        """A line that is in metrics.jsonl already: W&B follows that file. To it comes how many steps were skipped."""
        self._skipped += line.get("skipped") or 0
        line = {**line, "skipped_steps": self._skipped}
        self.progress.write(line)
        evaluated = any(key.startswith("eval/") for key in line)
        tensorboard = self._tensorboard
        if tensorboard and (line["step"] % self._every == 0 or evaluated or line["step"] == self._total):
            self._guarded(lambda: tensorboard.write(line))

    def close(self) -> None:
        if self._tensorboard:
            self._guarded(self._tensorboard.close)
        if self._wandb:
            self._wandb.close()
        self.progress.close()

    def _guarded(self, action: Callable[[], object]) -> None:
        """TensorBoard writes no more after its first failure, such as a full disk."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a logger does, training goes on
            self._tensorboard = None
            self.progress.say(f"warning: tensorboard: no more of it: {error}")


def wandb_target(run: Path, recipe: Recipe, identity: str, after_step: int = 0, mode: str | None = None) -> Target:
    """Where a run's metrics go, as its recipe says."""
    return Target(
        run=str(run),
        identity=identity,
        project=recipe.logging.wandb_project,
        mode=mode or recipe.logging.wandb,
        after_step=after_step,
        every_steps=recipe.logging.every_steps,
        last_step=recipe.train_steps,
        config=recipe.model_dump(),
    )


def sync_wandb(run: Path, identity: str | None, mode: str) -> str:
    """Make one W&B run of the whole metrics.jsonl. identity: default: the run's own.

    Returns what was done. Raises UserError for a folder without a run, RunError where wandb fails.
    """
    if not (run / "recipe.toml").exists() or not (run / "metrics.jsonl").exists():
        raise UserError(f"{run}: no run with metrics here: name the folder that a recipe's `run` names")
    recipe = load_recipe(run / "recipe.toml")
    check_wandb(required=True)
    if identity is None:
        latest = CheckpointFolder(run / "checkpoints", keep=1).latest()
        identity = (read_meta(latest).loggers.get("wandb") if latest else None) or uuid.uuid4().hex[:8]
    target = wandb_target(run, recipe, identity, mode=mode)
    try:
        folder = upload(target)
    except Exception as error:
        raise RunError(f"{run}: wandb: {' '.join(str(error).split())[:300]}") from error
    return f"{run}: W&B run {identity} of project {target.project}, from metrics.jsonl: {folder}"
