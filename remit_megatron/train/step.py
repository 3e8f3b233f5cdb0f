"""One optimizer step: scores, then the student's forward and backward, then the update."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron import flops
from remit_megatron.data.microbatch import Scores
from remit_megatron.data.steps import Loader, Step
from remit_megatron.mcore.passes import run_schedule
from remit_megatron.mcore.step import ForwardStep
from remit_megatron.run.checkpoint import Meta
from remit_megatron.run.prepare import Ready
from remit_megatron.scores.source import Filled, ScoreSource
from remit_megatron.train.metrics import read, reduce_reports
from remit_megatron.train.student import Student


@dataclass(slots=True)
class Progress:
    """Where the run stands. The step moves it on; everybody else reads it."""

    meta: Meta


class TrainStep:
    """Trains on the next step's microbatches each time it is called. Collective."""

    def __init__(
        self,
        ready: Ready,
        student: Student,
        forward_step: ForwardStep,
        source: ScoreSource | None,
        loader: Loader,
        progress: Progress,
    ):
        self.ready = ready
        self.student = student
        self.forward_step = forward_step
        self.source = source
        self.progress = progress
        self._steps: Iterator[Step] = iter(loader)

    def __call__(self, step: int, *, asked_to_stop: bool = False) -> tuple[dict[str, Any], bool]:
        """(the step's line for metrics.jsonl, whether any rank was asked to stop)."""
        started = self._now()
        self.student.begin_step()
        data = next(self._steps)
        loaded = self._now()
        filled = self._filled(step, data)
        scored = self._now()
        reports = self._forward_backward(step, filled)
        lr = self.student.learning_rate()
        updated, grad_norm = self.student.update()
        tokens = self.progress.meta.tokens + self.ready.recipe.batch.global_batch_tokens
        self.student.advance(tokens)
        ratios, (stop,) = reduce_reports(
            reports,
            self.ready.groups.counts_loss,
            [float(asked_to_stop)],
            self.ready.process.device,
            declared=self.forward_step.objective.metrics,
        )
        elapsed = self._now() - started
        meta, skipped = self.progress.meta, int(not updated)
        self.progress.meta = replace(
            meta,
            step=step,
            tokens=tokens,
            bad_steps=(meta.bad_steps + 1) * skipped,
            skipped=(meta.skipped or 0) + skipped,
        )
        line = {"step": step, "tokens": tokens, **read(ratios), "grad_norm": grad_norm, "lr": lr}
        line |= {"skipped": skipped, **self._timing(elapsed, scored - loaded, filled), "data_ms": data.wait_ms}
        if skipped and (broken := self._broken_scores(filled)):
            line["broken_scores"] = broken
        return line, bool(stop)

    def _broken_scores(self, filled: Filled) -> int:
        """Unmasked tokens of which the reference gave no number, over all ranks. Collective."""
        count = torch.zeros((), device=self.ready.process.device)
        for one in filled.microbatches if self.ready.groups.counts_loss else ():
            kept = self.ready.deal.cut(one.loss_mask.to(count.device)) > 0
            scores = one.scores or Scores()
            if scores.ref_nll is not None:
                count += (kept & ~scores.ref_nll.isfinite()).sum()
            elif scores.hidden is not None:
                count += (kept & ~scores.hidden.isfinite().all(dim=-1)).sum()
        dist.all_reduce(count)
        return int(count)

    def _filled(self, step: int, data: Step) -> Filled:
        """The microbatches, with scores where the objective takes any."""
        if self.source is None:
            return Filled(microbatches=data.microbatches, ran_reference=False)
        return self.source.fill(step, data.microbatches)

    def _forward_backward(self, step: int, filled: Filled) -> list[Any]:
        """Gradients of the step; the last stage's reports, one a microbatch."""
        chunks = self.student.chunks
        self.forward_step.step = step
        for chunk in chunks:
            chunk.train()
        microbatches = self.forward_step.selected(filled.microbatches, chunks)
        return run_schedule(self.forward_step, microbatches, chunks, forward_only=False)

    def _timing(self, elapsed_s: float, score_s: float, filled: Filled) -> dict[str, float]:
        """Durations in ms, rates in tokens/s."""
        recipe, process, plan = self.ready.recipe, self.ready.process, self.ready.plan
        tokens_per_s = recipe.batch.global_batch_tokens / elapsed_s
        timing = {"step_ms": elapsed_s * 1e3, "tokens_per_s": tokens_per_s, "ranks": process.world_size}
        if self.source is not None:
            timing["score_ms"] = score_s * 1e3
        if recipe.reference and recipe.reference.queue:
            timing |= {"wait_ms": filled.waited_ms, "scored_online": int(filled.ran_reference)}
        peak = flops.peak_flops(process.device)
        if peak:
            reference = plan.reference_shape if filled.ran_reference else None
            per_token = flops.training_flops_per_token(plan.shape, reference, recipe.data.sequence_length)
            timing["mfu"] = tokens_per_s * per_token / (peak * process.world_size)
        return timing

    def _now(self) -> float:
        """Seconds; the device has done all that was asked of it."""
        if self.ready.process.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
