"""Metrics of a run: summed over microbatches and ranks as numerators and denominators, written a line a step."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.data.files import write_atomically, writing
from remit_megatron.errors import RunError, UserError

NAMES = ("loss", "nll", "ref_nll", "gap", "weight", "weight_sq", "clipped_low", "clipped_high", "selected", "kl")
"""Metrics with a place of their own in the sum over ranks, in this order: of more than two ranks, what a sum rounds to
may depend on the place. Others come after them."""
RENAMED = {"gap": "gap_mean", "weight": "weight_mean"}


def reduce_reports(
    reports: list[dict[str, Tensor]],
    counts: bool,
    flags: list[float],
    device: torch.device,
    *,
    declared: Sequence[str] = (),
) -> Any:
    """Sum the loss reports of all microbatches and ranks, with some flags, in one all-reduce over the world.

    reports: of this rank's microbatches, name -> [numerator, denominator]; empty off the last stage. counts: whether
    this rank's reports count (one rank per slice of the batch). declared: names that reports may have, the same on
    every rank. Returns (name -> (numerator, denominator) on every rank, summed flags). The order of the sum is fixed by
    the layout, so a run repeats bit for bit.
    """
    names = (*NAMES, *(name for name in declared if name not in NAMES))
    extra = sorted({name for report in reports for name in report} - set(names))
    assert not extra, f"metrics that the objective does not declare: {extra}"
    flat = torch.zeros(2 * len(names) + len(flags), dtype=torch.float64)
    if counts:
        for report in reports:
            for name, ratio in report.items():
                i = 2 * names.index(name)
                flat[i : i + 2] += ratio.double().cpu()
    flat[2 * len(names) :] = torch.tensor(flags, dtype=torch.float64)
    flat = flat.to(device)
    dist.all_reduce(flat)
    values = flat.tolist()
    ratios = {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names) if values[2 * i + 1]}
    return ratios, values[2 * len(names) :]


def read(ratios: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means under the names of metrics.jsonl; the weights' spread instead of their square, and counts of selected and
    of all unmasked tokens instead of their ratio."""
    counts = {}
    if "selected" in ratios:
        selected, unmasked = ratios["selected"]
        counts = {"selected_tokens": selected, "unmasked_tokens": unmasked}
        ratios = {name: ratio for name, ratio in ratios.items() if name != "selected"}
    means = {name: num / den for name, (num, den) in ratios.items()}
    if "weight_sq" in means:
        # Never negative beyond rounding: E[w^2] - E[w]^2.
        means["weight_std"] = math.sqrt(max(0.0, means.pop("weight_sq") - means["weight"] ** 2))
    return {RENAMED.get(name, name): value for name, value in means.items()} | counts


class MetricsFile:
    """metrics.jsonl: one line a step, full precision. Lines after `resumed_step` are dropped at start, whatever a crash
    of the machine has made of them. Raises UserError where one before is damaged, or steps do not rise.

    A line that a full disk refuses is kept and written with the next; a checkpoint is not made without it.
    """

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        lines, self.missing = _lines_until(path, resumed_step)
        """Steps before the checkpoint that have no line, in words; None where all have one."""
        write_atomically(path, "".join(lines).encode())
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._pending = b""
        self._warned = False

    def write(self, line: dict[str, Any]) -> None:
        """Raises nothing: see `sync`."""
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                logging.getLogger(__name__).warning("%s cannot be written now: %s", self.path, error)
            self._warned = True

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine; called before a checkpoint is committed.

        Raises RunError where lines cannot be written.
        """
        with writing(self.path):
            self._flush()
            os.fsync(self._descriptor)

    def _flush(self) -> None:
        # A full disk may take half a line: the next attempt goes on after it.
        while self._pending:
            self._pending = self._pending[os.write(self._descriptor, self._pending) :]

    def close(self) -> None:
        """After a failure, whose error is under way, what cannot be written stays unwritten."""
        try:
            self.sync()
        except RunError as error:
            logging.getLogger(__name__).warning("%s", error)
        os.close(self._descriptor)


def _lines_until(path: Path, last_step: int) -> tuple[list[str], str | None]:
    """The lines up to that step's, which were made durable with its checkpoint, and the steps that have none. Half a
    line may follow, or worse."""
    lines: list[str] = []
    missing: list[str] = []
    before = 0
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []:
        if before >= last_step or not line.endswith("\n"):
            break
        step = _step_of(path, len(lines) + 1, line)
        if step <= before:
            raise UserError(
                f"{path}: line {len(lines) + 1} is of step {step} and follows step {before}: restore the file, or move "
                "it away to go on without its lines"
            )
        missing += _range(before + 1, min(step - 1, last_step))
        before = min(step, last_step)
        if step <= last_step:
            lines.append(line)
    missing += _range(before + 1, last_step)
    return lines, ", ".join(missing) or None


def _step_of(path: Path, number: int, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise UserError(f"{path}: line {number} is damaged: restore it, or move the file away") from None


def _range(first: int, last: int) -> list[str]:
    return [] if last < first else [str(first) if first == last else f"{first} to {last}"]
