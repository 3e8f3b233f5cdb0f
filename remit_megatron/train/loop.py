"""The training loop: a short list of named steps around Megatron's schedules."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Recipe, dump_toml
from remit_megatron.data.loader import BatchPlan, Step, make_loader
from remit_megatron.data.manifest import tokenizer_hash
from remit_megatron.errors import RunError, StopRequested, UserError
from remit_megatron.mcore import datasets, dist_checkpoint, optim
from remit_megatron.mcore.groups import Groups, data_parallel_size, initialize_groups
from remit_megatron.mcore.step import make_forward_step, run_schedule
from remit_megatron.reference.online import Reference
from remit_megatron.reference.precision import precision_error
from remit_megatron.train import flops
from remit_megatron.train.checkpoint import CheckpointFolder, Meta, read_meta
from remit_megatron.train.evaluate import Evaluator
from remit_megatron.train.folder import RunFolder
from remit_megatron.train.loggers import Loggers
from remit_megatron.train.metrics import MetricsFile, read, reduce_reports
from remit_megatron.train.models import build_reference, build_student, make_plan
from remit_megatron.train.runtime import Process, StopSignals, joined_process


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, from its newest checkpoint where it has one. Called on every rank.

    Raises UserError for a mistake in recipe or input (nothing is written then), RunError for a failure,
    StopRequested after a signal, when the checkpoint is complete.
    """
    with StopSignals() as signals, joined_process(recipe.compute) as process:
        trainer = Trainer(recipe, process)
        try:
            trainer.run(signals)
        finally:
            trainer.close()


class Trainer:
    """State of a run on one rank. Construction is the set-up; `run` trains."""

    def __init__(self, recipe: Recipe, process: Process):
        self.recipe = recipe
        self.process = process
        self.is_main = process.rank == 0
        self.objective = recipe.build_objective()
        self.plan = make_plan(recipe, process.device.type)
        self.num_microbatches = _microbatches(recipe, process.world_size)
        self.groups: Groups = initialize_groups(recipe.parallel, recipe.seed)
        self.sources = self._open_data()
        self.evaluator = Evaluator(recipe, self.groups, self.plan.shape.vocab_size, self.tokenizer_hash)
        self.chunks, config = build_student(recipe, self.plan, process.device)
        self.reference = build_reference(recipe, self.plan, process.device)

        # Everything that a mistake could stop is behind us: from here on the run folder is written to.
        self.folder = RunFolder(Path(recipe.run), recipe)
        self._on_main(self.folder.claim)
        self.checkpoints = CheckpointFolder(self.folder.path / "checkpoints", recipe.checkpoint.keep)
        resume = self.checkpoints.latest()
        self.chunks = optim.wrap_ddp(self.chunks, config, recipe.parallel)
        self.optimizer, self.scheduler = optim.build_optimizer(
            self.chunks, recipe.optimizer, recipe.schedule, recipe.parallel, self.plan.dtype
        )
        self.meta = self._resume(resume) if resume else self._fresh_meta()
        optim.advance(self.scheduler, self.meta.tokens)

        total_samples = recipe.train_steps * recipe.global_batch_samples
        self.data = datasets.TrainingData(self.sources, recipe.data, total_samples)
        self.loader = make_loader(
            recipe.data.loader,
            self.data.sample,
            BatchPlan(
                first_sample=self.meta.step * recipe.global_batch_samples,
                num_steps=recipe.train_steps - self.meta.step,
                num_microbatches=self.num_microbatches,
                microbatch_samples=recipe.batch.microbatch_samples,
                dp_rank=self.groups.dp.rank(),
                dp_size=self.groups.dp.size(),
            ),
            device=process.device,
            prefetch_steps=recipe.data.prefetch_steps,
        )
        self.forward_step = make_forward_step(
            self.objective,
            self.reference.chunks if self.reference else None,
            groups=self.groups,
            merge_microbatches=recipe.reference.merge_microbatches if recipe.reference else 1,
        )
        self.background = dist_checkpoint.BackgroundSave() if recipe.checkpoint.asynchronous else None
        self.loggers: Loggers | None = None
        self.metrics: MetricsFile | None = None
        if self.is_main:
            self.folder.write_recipe(dump_toml(recipe))
            self.loggers = Loggers(self.folder.path, recipe, self.meta.step, self.meta.loggers)
            self.metrics = MetricsFile(self.folder.path / "metrics.jsonl", self.meta.step)
            self._say_start(resume)
        if self.reference and self.reference.products:
            self._report_precision(self.reference)

    # Set-up.

    def _open_data(self) -> list[Any]:
        recipe = self.recipe
        made_with = tokenizer_hash(recipe.data.tokenizer) if recipe.data.tokenizer else None
        sources = [
            datasets.open_source(source.path, recipe.data, self.plan.shape.vocab_size, made_with)
            for source in recipe.data.train
        ]
        hashes = {s.info.prefix: s.info.tokenizer_hash for s in sources if s.info.tokenizer_hash}
        if len(set(hashes.values())) > 1:
            raise UserError(
                f"data.train: the datasets were made with different tokenizers: {', '.join(map(str, hashes))}"
            )
        self.tokenizer_hash = made_with or next(iter(hashes.values()), None)
        for key, meta in (("model.init", self.plan.init_meta), ("reference.path", self.plan.reference_meta)):
            if meta and meta.tokenizer and self.tokenizer_hash and meta.tokenizer != self.tokenizer_hash:
                raise UserError(f"{key}: it was trained with another tokenizer than that of data.train")
        return sources

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; its UserError is raised on every rank, so that none waits for another."""
        refusal: list[str | None] = [None]
        if self.is_main:
            try:
                action()
            except UserError as error:
                refusal = [str(error)]
        dist.broadcast_object_list(refusal, device=self.process.device)
        if refusal[0] is not None:
            raise UserError(refusal[0])

    def _fresh_meta(self) -> Meta:
        return Meta(
            shape=self.plan.shape.model_dump(),
            recipe=self.recipe.fingerprint(),
            data={s.path: o.info.fingerprint for s, o in zip(self.recipe.data.train, self.sources, strict=True)},
            tokenizer=self.tokenizer_hash,
            distributed_optimizer=self.recipe.parallel.distributed_optimizer,
            precision="bf16" if self.plan.dtype is torch.bfloat16 else "fp32",
        )

    def _resume(self, path: Path) -> Meta:
        saved, fresh = read_meta(path), self._fresh_meta()
        for key in ("shape", "data", "tokenizer", "distributed_optimizer", "precision"):
            if getattr(saved, key) != getattr(fresh, key):
                raise UserError(
                    f"checkpoint {path}: its {key} is {getattr(saved, key)}, this start has {getattr(fresh, key)}: "
                    "restore what changed, or start another run folder"
                )
        dist_checkpoint.load_training(path, self.chunks, self.optimizer)
        return saved

    def _say_start(self, resume: Path | None) -> None:
        recipe, shape = self.recipe, self.plan.shape
        assert self.loggers is not None
        say = self.loggers.progress.say
        start = f"resumes from {resume.name}" if resume else f"starts from {self.plan.init or 'random weights'}"
        say(f"{recipe.run}: {self.objective.name}, {shape.num_parameters() / 1e6:,.1f}M parameters, {start}")
        p = recipe.parallel
        say(
            f"{self.process.world_size} ranks on {self.process.device.type}: tensor {p.tensor}, pipeline {p.pipeline} x "
            f"{p.virtual_pipeline}, context {p.context}, data {self.groups.dp.size()}; "
            f"{self.num_microbatches} microbatches a step"
        )
        for source in self.sources:
            for warning in source.info.warnings:
                say(f"warning: {warning}")

    def _report_precision(self, reference: Reference) -> None:
        """Measure on a microbatch of the first step what FP8 does to the reference's scores. Collective."""
        self._sync_params()
        batches = datasets.microbatches(
            self.data,
            0,
            min(self.recipe.parallel.pipeline, self.num_microbatches),
            self.recipe.batch.microbatch_samples,
            self.groups.dp.rank(),
            self.groups.dp.size(),
        )
        errors = precision_error(reference, self.forward_step, self.chunks, batches)
        if self.loggers:
            for name, error in errors.items():
                self.loggers.progress.say(
                    f"reference in fp8: error of {name} {error.rms:.2e} rms, {error.largest:.2e} at most, over "
                    f"{error.tokens:,} tokens"
                )

    # The run.

    def run(self, signals: StopSignals) -> None:
        """Train to the last step, or until a signal asks to stop."""
        recipe, total = self.recipe, self.recipe.train_steps
        step = self.meta.step
        steps = iter(self.loader)
        while step < total:
            step += 1
            line, stop = self._train_step(step, steps, signals)
            if (recipe.evaluation.every_steps and step % recipe.evaluation.every_steps == 0) or step == total:
                line.update(self._evaluate())
            self._write(line)
            self._refuse_divergence()
            if self.background:
                self.background.poll()
            due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
            if due or step == total or stop:
                self._save(wait=step == total or stop)
            if stop and step < total:
                raise StopRequested(f"{recipe.run}: stopped on request after step {step}; start it again to go on")
        if self.loggers:
            self.loggers.progress.say(f"{recipe.run}: done, {self.meta.tokens:,} tokens")

    def _train_step(self, step: int, steps: Iterator[Step], signals: StopSignals) -> tuple[dict[str, Any], bool]:
        """One optimizer step. Returns its line for metrics.jsonl and whether any rank was asked to stop."""
        recipe = self.recipe
        started = self._now()
        optim.zero_grads(self.chunks, self.optimizer)
        data = next(steps)
        batches = data.microbatches
        self.forward_step.step = step
        loaded = scored = self._now()
        if self.objective.needs_reference:
            self.forward_step.score(batches)
            scored = self._now()
        for chunk in self.chunks:
            chunk.train()
        self.forward_step.select(batches, self.chunks)
        reports = run_schedule(self.forward_step, batches, self.chunks, forward_only=False)
        lr = optim.learning_rate(self.scheduler)
        updated, grad_norm = optim.optimizer_step(self.optimizer, recipe.optimizer.clip_grad_norm)
        tokens = self.meta.tokens + recipe.batch.global_batch_tokens
        optim.advance(self.scheduler, tokens)
        ratios, (stop,) = reduce_reports(
            reports, self.groups.counts_loss, [float(signals.requested)], self.process.device
        )
        elapsed = self._now() - started
        self.meta = Meta(
            **{**asdict(self.meta), "step": step, "tokens": tokens}
            | {"bad_steps": 0 if updated else self.meta.bad_steps + 1}
        )
        line = {"step": step, "tokens": tokens, **read(ratios), "grad_norm": grad_norm, "lr": lr}
        line["skipped"] = int(not updated)
        line.update(self._timing(elapsed, scored - loaded), data_ms=data.wait_ms)
        return line, bool(stop)

    def _timing(self, elapsed_s: float, score_s: float) -> dict[str, float]:
        tokens_per_s = self.recipe.batch.global_batch_tokens / elapsed_s
        timing = {"step_ms": elapsed_s * 1e3, "tokens_per_s": tokens_per_s}
        if self.objective.needs_reference:
            timing["score_ms"] = score_s * 1e3
        peak = flops.peak_flops(self.process.device)
        if peak:
            per_token = flops.training_flops_per_token(
                self.plan.shape, self.plan.reference_shape, self.recipe.data.sequence_length
            )
            timing["mfu"] = tokens_per_s * per_token / (peak * self.process.world_size)
        return timing

    def _evaluate(self) -> dict[str, float]:
        self._sync_params()
        return self.evaluator.run(self.chunks, self.process.device)

    def _write(self, line: dict[str, Any]) -> None:
        if self.loggers and self.metrics:
            # JSON has no NaN: a step without a finite norm says null.
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
            self.metrics.write(finite)
            self.loggers.write({k: v if v is not None else float("nan") for k, v in finite.items()})

    def _refuse_divergence(self) -> None:
        if self.meta.bad_steps and self.loggers:
            self.loggers.progress.say(
                f"step {self.meta.step}: the gradient norm is not finite: no update ({self.meta.bad_steps} in a row)"
            )
        if self.meta.bad_steps >= self.recipe.optimizer.max_bad_steps:
            raise RunError(
                f"{self.meta.bad_steps} steps in a row had a gradient norm that is not finite "
                f"(optimizer.max_bad_steps = {self.recipe.optimizer.max_bad_steps}), last at step {self.meta.step}: the "
                "newest checkpoint is from before; lower optimizer.peak_lr or look at the data of these steps"
            )

    # Checkpoints.

    def _save(self, wait: bool) -> None:
        if self.reference:
            self.reference.verify_frozen()
        self._sync_params()
        meta = self.meta
        if self.loggers and self.metrics:
            meta = Meta(**{**asdict(meta), "loggers": self.loggers.identities})
            self.metrics.sync()
        if self.background:
            self.background.wait()
        partial = self.checkpoints.partial(meta.step)
        if self.is_main:
            self.checkpoints.begin(meta.step)
        dist.barrier()

        def commit() -> None:
            if self.is_main:
                self.checkpoints.commit(meta)
            dist.barrier()

        if self.background:
            self.background.start(partial, self.chunks, self.optimizer, commit)
            if wait:
                self.background.wait()
        else:
            dist_checkpoint.save(partial, self.chunks, self.optimizer)
            commit()

    def _sync_params(self) -> None:
        """With overlapped gathering, weights are complete only once their next forward pass asked for them."""
        if self.recipe.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _now(self) -> float:
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def close(self) -> None:
        self.loader.close()
        if self.metrics:
            self.metrics.close()
        if self.loggers:
            self.loggers.close()
        self.folder.release()


def _microbatches(recipe: Recipe, world_size: int) -> int:
    """Microbatches a data-parallel rank has in a step. Raises UserError when the batch does not divide."""
    dp = data_parallel_size(recipe.parallel, world_size)
    samples, per_round = recipe.global_batch_samples, dp * recipe.batch.microbatch_samples
    if samples % per_round:
        raise UserError(
            f"batch.global_batch_tokens = {recipe.batch.global_batch_tokens} is {samples} samples, which do not divide "
            f"by batch.microbatch_samples x data-parallel ranks = {recipe.batch.microbatch_samples} x {dp}"
        )
    count = samples // per_round
    p = recipe.parallel
    if p.virtual_pipeline > 1 and count % p.pipeline:
        raise UserError(
            f"batch: {count} microbatches a step do not divide by parallel.pipeline = {p.pipeline}, which "
            "parallel.virtual_pipeline needs"
        )
    return count
