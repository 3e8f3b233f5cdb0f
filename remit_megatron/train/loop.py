"""The training loop: a short list of named steps around Megatron's schedules."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import Recipe, dump_toml
from remit_megatron.data.loader import BatchPlan, Step, check_loader, make_loader
from remit_megatron.errors import DamagedError, RunError, StopRequested, UserError
from remit_megatron.mcore import datasets, dist_checkpoint, optim
from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.groups import Groups, initialize_groups
from remit_megatron.mcore.step import make_forward_step, run_schedule
from remit_megatron.reference.cache import ScoreCache
from remit_megatron.reference.online import Reference
from remit_megatron.reference.precision import precision_error
from remit_megatron.reference.score_manifest import CacheManifest
from remit_megatron.train import flops
from remit_megatron.train.announce import start_lines
from remit_megatron.train.checkpoint import CheckpointFolder, Meta, read_meta
from remit_megatron.train.evaluate import Evaluator
from remit_megatron.train.fallback import newest_whole
from remit_megatron.train.fit import check_documents, num_microbatches
from remit_megatron.train.folder import RunFolder
from remit_megatron.train.loggers import Loggers, check_loggers
from remit_megatron.train.metrics import MetricsFile, read, reduce_reports
from remit_megatron.train.models import build_reference, build_student, make_plan
from remit_megatron.train.queued import QueuedScores
from remit_megatron.train.runtime import Process, StopSignals, from_rank_0, joined_process
from remit_megatron.train.scorer import Scorer, cache_manifest, random_samples
from remit_megatron.train.sources import open_sources
from remit_megatron.train.status import Status
from remit_megatron.train.tokens import open_records
from remit_megatron.train.watchdog import Watchdog
from remit_megatron.train.write_through import WriteThrough


def train(recipe: Recipe, *, fallback: bool = False) -> None:
    """Run a recipe to its end, from its newest checkpoint where it has one. Called on every rank.

    fallback: where the newest one is damaged, go on from the newest whole one.

    Raises UserError for a mistake in recipe or input (nothing is written then), RunError for a failure,
    StopRequested after a signal, when the checkpoint is complete; HangError where ranks do not answer.
    """
    status = Status(Path(recipe.run))
    watchdog = Watchdog(recipe.watchdog, status)
    with StopSignals() as signals, watchdog, status.outcome(), joined_process(recipe.compute) as process:
        trainer = Trainer(recipe, process, status, watchdog, fallback=fallback)
        try:
            trainer.run(signals)
        finally:
            trainer.close()


class Trainer:
    """State of a run on one rank. Construction is the set-up; `run` trains."""

    def __init__(
        self,
        recipe: Recipe,
        process: Process,
        status: Status | None = None,
        watchdog: Watchdog | None = None,
        *,
        fallback: bool = False,
    ):
        self.recipe = recipe
        self.process = process
        self.status = status or Status(Path(recipe.run))
        self.watchdog = watchdog or Watchdog()
        self.is_main = process.rank == 0
        self.objective = recipe.build_objective()
        self.folder = RunFolder(Path(recipe.run), recipe)
        from_rank_0(self.folder.check, process.device)
        self.checkpoints = CheckpointFolder(self.folder.path / "checkpoints", recipe.checkpoint.keep)
        whole, passed_over = newest_whole(self.checkpoints, process.device) if fallback else (None, {})
        self.plan = from_rank_0(lambda: make_plan(recipe, process.device.type, whole), process.device)
        self.num_microbatches = num_microbatches(recipe, process.world_size)
        self.groups: Groups = initialize_groups(recipe.parallel, recipe.seed, recipe.compute.collective_timeout_s)
        self.sources, self.tokenizer_hash = open_sources(recipe, self.plan)
        self.data = datasets.TrainingData(self.sources, recipe.data, recipe.train_steps * recipe.global_batch_samples)
        check_documents(recipe, self.data.eod_id, self.plan.shape.vocab_size)
        check_loggers(recipe)
        check_loader(recipe.data.loader)
        self.evaluator = Evaluator(recipe, self.groups, self.plan.common_rows, self.tokenizer_hash)
        self.chunks, config = build_student(recipe, self.plan, process.device)
        self.reference = build_reference(recipe, self.plan, process.device)
        self.tokens = open_records(
            recipe, self.evaluator.sets, self.objective, self.reference, self.groups, process.device
        )
        self.scores = self._open_scores()
        self.write_through: WriteThrough | None = None
        wanted = cache_manifest(recipe, self.plan, self.data, self.tokenizer_hash) if recipe.reference else None
        if recipe.reference and recipe.reference.write_scores:
            assert wanted is not None
            self.write_through = WriteThrough(recipe, wanted, self.data, self.groups, process.device)
        resume = self.plan.resume
        self.meta = self._saved_meta(resume) if resume else self._fresh_meta()

        # Everything that a mistake could stop is behind us: from here on the run folder is written to.
        from_rank_0(self.folder.claim, process.device)
        self.status.claimed()
        if resume and passed_over:
            from_rank_0(lambda: self.checkpoints.pass_over(list(passed_over), resume), process.device)
        if self.is_main:
            self.status.open(recipe.train_steps, self.meta if resume else None)
        self.chunks = optim.wrap_ddp(self.chunks, config, recipe.parallel)
        self.optimizer, self.scheduler = optim.build_optimizer(
            self.chunks, recipe.optimizer, recipe.schedule, recipe.parallel, self.plan.dtype
        )
        if resume:
            self._load(resume)
        optim.advance(self.scheduler, self.meta.tokens)

        self.loader = make_loader(
            recipe.data.loader,
            self._sample,
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
            round_scores=recipe.reference.rounds if recipe.reference else False,
            graph=Replayed() if recipe.reference and recipe.reference.cuda_graph else None,
        )
        self.background = dist_checkpoint.BackgroundSave() if recipe.checkpoint.asynchronous else None
        self.loggers: Loggers | None = None
        self.metrics: MetricsFile | None = None
        from_rank_0(lambda: self._open_outputs(resume, passed_over), process.device)
        self.queue = self._open_queue(wanted)
        if self.reference and self.reference.products:
            self._report_precision(self.reference)

    # Set-up.

    def _open_scores(self) -> ScoreCache | None:
        """The scores that take the reference's place, compared with it; the model is then let go."""
        recipe = self.recipe
        if recipe.reference is None or recipe.reference.scores is None:
            return None
        folder, wanted = (
            Path(recipe.reference.scores),
            cache_manifest(recipe, self.plan, self.data, self.tokenizer_hash),
        )
        from_rank_0(lambda: ScoreCache.open(folder, wanted) and None, self.process.device)
        cache = ScoreCache.open(folder, wanted, verify=False)
        if self.reference:
            samples = random_samples(self.data.order.needed(), recipe.reference.check_samples)
            Scorer(recipe, self.data, self.reference, self.groups).check(cache, samples)
            self.reference = None
        return cache

    def _open_queue(self, scores: CacheManifest | None) -> QueuedScores | None:
        """The scores that a scorer makes beside this run, which is told where the run stands. Collective."""
        if scores is None or self.recipe.reference is None or self.recipe.reference.queue is None:
            return None
        say = self.loggers.progress.say if self.loggers else lambda text: None
        queue = QueuedScores(self.recipe, scores, self.data, self.groups, self.process.device, say)
        queue.publish(self.meta.step + 1)
        return queue

    def _sample(self, n: int) -> dict[str, Any]:
        sample = self.data.sample(n)
        if self.scores:
            sample["ref_nll"] = self.scores.scores(*self.data.order[n])
        return sample

    def _fresh_meta(self) -> Meta:
        return Meta(
            shape=self.plan.shape.model_dump(),
            recipe=self.recipe.fingerprint(),
            data={s.path: o.info.fingerprint for s, o in zip(self.recipe.data.train, self.sources, strict=True)},
            tokenizer=self.tokenizer_hash,
            distributed_optimizer=self.recipe.parallel.distributed_optimizer,
            precision="bf16" if self.plan.dtype is torch.bfloat16 else "fp32",
            reference=self.plan.reference_identity,
        )

    def _saved_meta(self, path: Path) -> Meta:
        """Of the checkpoint to go on from. Raises UserError where this start is not one of its run."""
        saved, fresh = read_meta(path), self._fresh_meta()
        for key in ("shape", "data", "tokenizer", "distributed_optimizer", "precision", "reference"):
            if getattr(saved, key) != getattr(fresh, key):
                raise UserError(
                    f"checkpoint {path}: its {key} is {getattr(saved, key)}, this start has {getattr(fresh, key)}: "
                    "restore what changed, or start another run folder"
                )
        return saved

    def _load(self, path: Path) -> None:
        try:
            dist_checkpoint.load_training(path, self.chunks, self.optimizer)
        except DamagedError as error:
            raise self.checkpoints.refusal(path, error) from None

    def _open_outputs(self, resume: Path | None, passed_over: dict[Path, str]) -> None:
        """On rank 0."""
        self.folder.write_recipe(dump_toml(self.recipe))
        if self.meta.step < self.recipe.train_steps:
            self.status.undone()
        if self.tokens:
            self.tokens.resume(self.meta.step)
        self.metrics = MetricsFile(self.folder.path / "metrics.jsonl", self.meta.step)
        self.loggers = Loggers(self.folder.path, self.recipe, self.meta.step, self.meta.loggers)
        for path, problem in passed_over.items():
            self.loggers.progress.say(f"--fallback: {path.name} is passed over and set aside: {problem}")
        for text in start_lines(
            recipe=self.recipe,
            plan=self.plan,
            objective=self.objective,
            groups=self.groups,
            device=self.process.device,
            num_microbatches=self.num_microbatches,
            scores=self.scores.folder if self.scores else None,
            sources=self.sources,
            resume=resume,
        ):
            self.loggers.progress.say(text)

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
            self.watchdog.stepped(step)
            if (recipe.evaluation.every_steps and step % recipe.evaluation.every_steps == 0) or step == total:
                line.update(self._evaluate())
            if self.tokens and (step % recipe.logging.tokens_every_steps == 0 or step == total):
                self._sync_params()
                line.update(self.tokens.record(step, self.chunks))
            self._write(line)
            self._refuse_divergence()
            if self.background:
                self.background.poll()
            due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
            if due or step == total or stop:
                self._save(wait=step == total or stop)
            if stop and step < total:
                raise StopRequested(f"{recipe.run}: stopped on request after step {step}; start it again to go on")
        if self.queue:
            self.queue.publish(total + 1, done=True)
        self.watchdog.ending()
        from_rank_0(lambda: self.status.done(total), self.process.device)
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
        reference_ran = False
        if self.objective.needs_reference:
            reference_ran = self._score(step, batches)
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
        line.update(self._timing(elapsed, scored - loaded, reference_ran), data_ms=data.wait_ms)
        return line, bool(stop)

    def _score(self, step: int, batches: list[dict[str, torch.Tensor]]) -> bool:
        """The reference's scores, from the cache that this run fills or from a scorer where these have them.

        Returns whether the reference had to run here.
        """
        if self.write_through and self.write_through.read(step, batches):
            if self.queue:
                self.queue.skip(step)
            return False
        online = not (self.queue and self.queue.read(step, batches))
        if online:
            self.forward_step.score(batches)
        if self.write_through:
            self.write_through.write(step, batches)
        return online and self.scores is None

    def _timing(self, elapsed_s: float, score_s: float, reference_ran: bool) -> dict[str, float]:
        tokens_per_s = self.recipe.batch.global_batch_tokens / elapsed_s
        timing = {"step_ms": elapsed_s * 1e3, "tokens_per_s": tokens_per_s, "ranks": self.process.world_size}
        if self.objective.needs_reference:
            timing["score_ms"] = score_s * 1e3
        if self.queue:
            timing |= {"wait_ms": self.queue.wait_ms, "scored_online": int(self.queue.online)}
        peak = flops.peak_flops(self.process.device)
        if peak:
            reference = self.plan.reference_shape if reference_ran else None
            length = self.recipe.data.sequence_length
            per_token = flops.training_flops_per_token(self.plan.shape, reference, length)
            timing["mfu"] = tokens_per_s * per_token / (peak * self.process.world_size)
        return timing

    def _evaluate(self) -> dict[str, float]:
        self._sync_params()
        with self.watchdog.slow("an evaluation"):
            return self.evaluator.run(self.chunks, self.process.device)

    def _write(self, line: dict[str, Any]) -> None:
        if self.loggers and self.metrics:
            # JSON has no NaN: a step without a finite norm says null.
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
            self.metrics.write(finite)
            self.status.stepped(finite)
            self.loggers.write({k: v if v is not None else float("nan") for k, v in finite.items()})

    def _refuse_divergence(self) -> None:
        if self.meta.bad_steps and self.loggers:
            self.loggers.progress.say(
                f"step {self.meta.step}: the gradient norm is not finite: no update ({self.meta.bad_steps} in a row)"
            )
        if self.meta.bad_steps >= self.recipe.optimizer.max_bad_steps:
            raise RunError(
                f"{self.meta.bad_steps} steps in a row had a gradient norm that is not finite "
                f"(optimizer.max_bad_steps = {self.recipe.optimizer.max_bad_steps}), last at step {self.meta.step}: "
                f"look at the data of these steps, or start another run folder with model.init = '{self.recipe.run}' "
                "and a lower optimizer.peak_lr"
            )

    # Checkpoints.

    def _save(self, wait: bool) -> None:
        with self.watchdog.slow("a checkpoint"):
            self._save_now(wait)

    def _save_now(self, wait: bool) -> None:
        if self.reference:
            self.reference.verify_frozen()
        self._sync_params()
        meta = self.meta
        if self.loggers:
            meta = Meta(**{**asdict(meta), "loggers": self.loggers.identities})
        from_rank_0(self.metrics.sync if self.metrics else lambda: None, self.process.device)
        if self.background:
            self.background.wait()
        partial = self.checkpoints.partial(meta.step)
        from_rank_0(lambda: self.checkpoints.begin(meta.step), self.process.device)

        def commit() -> None:
            from_rank_0(lambda: self.checkpoints.commit(meta) and None, self.process.device)
            self.status.saved(meta.step)

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
        if self.queue:
            self.queue.close()
        if self.metrics:
            self.metrics.close()
        if self.loggers:
            self.loggers.close()
        self.folder.release()
