"""Score, then train: the forward step that Megatron's schedules call, and the reference's pass before it.

A step's microbatches are read once. The frozen reference runs over them forward-only, through Megatron's own schedule
(so any pipeline layout works), and each microbatch keeps its `ref_nll` on the ranks that compute the loss. Then the
ordinary training schedule runs with the same microbatches. Scores that are already in a batch are used as they are.
"""

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.attention import zigzag_slice
from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.groups import Groups, current_groups
from remit_megatron.mcore.loss_hook import RemitGPTModel
from remit_megatron.objectives import Objective
from remit_megatron.objectives.base import LossSum, TokenStats, check_by_sample
from remit_megatron.ops.distillation import Teacher
from remit_megatron.ops.score_steps import round_to_steps
from remit_megatron.ops.selection import top_share_of_all

Batch = dict[str, Tensor]
"""One microbatch, the whole sample on every rank. All [b, s]:

tokens, labels   int64
loss_mask        1 where the label is trained on, 0 elsewhere
position_ids     int64; default 0..s-1
segment_ids      int64, the document of each label within its sample, for document centring; optional
documents        int64, the document of each input token, for attention inside documents; optional
ref_nll          float32, nats, scores made ahead; optional
sample_id        int64 [b], identity of each sample, for weights shuffled within it; optional
"""


def make_forward_step(
    objective: Objective,
    reference: Any = None,
    *,
    groups: Groups | None = None,
    merge_microbatches: int = 1,
    round_scores: bool = False,
    graph: Replayed | None = None,
) -> "ForwardStep":
    """A forward step for Megatron's schedules that trains with `objective`.

    reference: the frozen RemitGPTModel (`scorer=True`), a rank's list of its chunks, or None when the objective needs
    none or batches carry `ref_nll`. merge_microbatches: how many microbatches the reference scores in one pass.
    round_scores: round `ref_nll` to the steps of scores on disk. graph: replays the reference's pass; without model
    parallelism and documents only.
    Use `prepare` before each step's schedule. Without pipelining it may be left out: then the reference runs inside
    the step, before the student.
    """
    chunks = reference if isinstance(reference, list) else [reference] if reference is not None else []
    return ForwardStep(objective, chunks, groups or current_groups(), merge_microbatches, round_scores, graph)


class ForwardStep:
    """Called by the schedule as `forward_step(data_iterator, model)`; see `make_forward_step`."""

    def __init__(
        self,
        objective: Objective,
        reference: list[Any],
        groups: Groups,
        merge_microbatches: int = 1,
        round_scores: bool = False,
        graph: Replayed | None = None,
    ):
        self.objective = objective
        self.reference = reference
        self.groups = groups
        self.merge_microbatches = merge_microbatches
        self.round_scores = round_scores
        self.graph = graph
        self.step = 0
        """Number of the optimizer step, for objectives that draw random numbers; the training loop sets it."""
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def prepare(self, data_iterator: Iterator[Batch], num_microbatches: int, chunks: list[Any] | Any) -> Any:
        """Read a step's microbatches, score them where the objective needs it, and return the schedule's data_iterator.

        chunks: the student's model chunks on this rank, for the number of iterators the schedule expects.
        """
        batches = [dict(next(data_iterator)) for _ in range(num_microbatches)]
        if self.objective.needs_reference:
            self.score(batches)
        self.select(batches, chunks if isinstance(chunks, list) else [chunks])
        return schedule_iterators(batches, chunks)

    @torch.no_grad()
    def score(self, batches: list[Batch]) -> None:
        """Run the reference over `batches` that carry no scores, and add to each, on last-stage ranks, `ref_nll_local`
        [b, s/cp], or `ref_hidden_local` [b, s/cp, h] for an objective that needs the reference's whole distribution."""
        if self._is_scored(batches[0]):
            return
        if not self.reference:
            raise UserError(
                f"objective '{self.objective.name}' needs ref_nll: give make_forward_step a reference, or put scores "
                "into the batches"
            )
        head = unwrap(self.reference[-1])
        with head.hidden_states() if self._needs_hidden else contextlib.nullcontext():
            scores = self.nll_of(self.reference, batches, self.graph)
        if self.groups.is_last_stage:
            for batch, score in zip(batches, scores, strict=True):
                if self._needs_hidden:
                    batch["ref_hidden_local"] = score.to(head.head_weight().dtype)
                else:
                    batch["ref_nll_local"] = round_to_steps(score) if self.round_scores else score

    @property
    def _needs_hidden(self) -> bool:
        return getattr(self.objective, "needs_reference_hidden", False)

    def _is_scored(self, batch: Batch) -> bool:
        scores = {"ref_hidden_local"} if self._needs_hidden else {"ref_nll", "ref_nll_local"}
        return bool(scores & batch.keys())

    @torch.no_grad()
    def nll_of(self, chunks: list[Any], batches: list[Batch], graph: Replayed | None = None) -> list[Tensor]:
        """NLL [b, s/cp] of each batch under a rank's model chunks, on last-stage ranks; elsewhere an empty list."""
        k = self.merge_microbatches
        merged = [_concatenate(batches[i : i + k]) for i in range(0, len(batches), k)]
        if len({len(b["tokens"]) for b in merged}) > 1:  # p2p shapes are fixed within one schedule run
            merged = [_concatenate([b]) for b in batches]
        scores: list[Tensor] = []
        run_schedule(functools.partial(self._score_step, scores, graph), merged, chunks, forward_only=True)
        if not self.groups.is_last_stage:
            return []
        return list(torch.cat(scores).split([len(b["tokens"]) for b in batches]))

    @torch.no_grad()
    def nll_and_kl_of(self, chunks: list[Any], batches: list[Batch]) -> list[Tensor]:
        """[2, b, s/cp] of each batch on last-stage ranks, elsewhere an empty list: the NLL under a rank's model chunks,
        and their KL from the reference's distribution. For an objective that takes the reference's distribution; the
        chunks are no scorer's."""
        assert self._needs_hidden, f"objective '{self.objective.name}' does not take the reference's distribution"
        scored = [dict(batch) for batch in batches]
        self.score(scored)
        found: list[Tensor] = []
        run_schedule(functools.partial(self._distil_step, found), scored, chunks, forward_only=True)
        return found

    def _distil_step(self, found: list[Tensor], iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        with self._distillation(batch, unwrap(model)):
            both, local = self._forward(batch, model)
        return both, functools.partial(_keep, found, local)

    @torch.no_grad()
    def select(self, batches: list[Batch], chunks: list[Any]) -> None:
        """For an objective whose tokens compete over the whole step: add `selected_local` [b, s/cp] to each batch.

        Runs the student forward-only over the scored batches first, and nothing for any other objective.
        """
        share = getattr(self.objective, "global_share", None)
        if share is None:
            return
        scores = self.nll_of(chunks, batches)
        if not self.groups.is_last_stage:
            return
        if "sample_id" not in batches[0]:
            raise UserError(f"objective '{self.objective.name}' with scope = 'global' needs sample_id in each batch")
        parts = [self.local_batch(batch, chunks[-1]) for batch in batches]
        selected = top_share_of_all(
            [nll.double() - part["ref_nll"].double() for nll, part in zip(scores, parts, strict=True)],
            [part["loss_mask"] for part in parts],
            share,
            sample_ids=[part["sample_id"] for part in parts],
            positions=self._positions(scores[0]),
            group=self.groups.dp_cp,
        )
        for batch, one in zip(batches, selected, strict=True):
            batch["selected_local"] = one

    def _positions(self, local: Tensor) -> Tensor:
        """[s/cp] int64: places in the whole sample of the positions of `local` [b, s/cp]."""
        place = torch.arange(local.size(1) * self.groups.cp.size(), device=local.device)
        return zigzag_slice(place[None], self.groups.cp.rank(), self.groups.cp.size())[0]

    def _score_step(
        self, scores: list[Tensor], graph: Replayed | None, iterator: Iterator[Batch], model: Any
    ) -> tuple[Tensor, Any]:
        local = self.local_batch(next(iterator), model)
        return self._run(local, model, graph), functools.partial(_keep, scores, local)

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data_iterator)
        if self.objective.needs_reference and not self._is_scored(batch) and self.groups.is_last_stage:
            if self.groups.pp.size() > 1:
                raise UserError("with pipeline parallelism call forward_step.prepare(...) before each step's schedule")
            batch = dict(batch)
            self.score([batch])
        if (
            getattr(self.objective, "global_share", None)
            and "selected_local" not in batch
            and self.groups.is_last_stage
        ):
            raise UserError("with scope = 'global' call forward_step.prepare(...) before each step's schedule")
        hook = unwrap(model)
        if isinstance(hook, RemitGPTModel) and hook.post_process and hook.loss_head == "sequence_chunks":
            return self._forward_by_sequence(batch, model)
        with self._distillation(batch, hook):
            output, local = self._forward(batch, model)
        return output, functools.partial(self.loss, local)

    def _distillation(self, batch: Batch, hook: Any) -> contextlib.AbstractContextManager[None]:
        """Hands the reference's distribution of this microbatch to the hook where the objective needs it."""
        if not (self._needs_hidden and hook.post_process):
            return contextlib.nullcontext()
        head = unwrap(self.reference[-1])
        teacher = Teacher(
            hidden=batch["ref_hidden_local"].transpose(0, 1),
            weight=head.head_weight(),
            temperature=self.objective.temperature,
            chunk_tokens=head.head_chunk_tokens,
            top_k=getattr(self.objective, "top_k", 0),
        )
        return hook.distilled_from(teacher)

    def _forward_by_sequence(self, batch: Batch, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The model runs the objective itself, sample by sample, and its output is the loss sum."""
        check_by_sample(self.objective)
        local, hook = self.local_batch(batch, model), unwrap(model)
        parts: list[LossSum] = []

        def loss_of_sequence(i: int, nll: Tensor) -> Tensor:
            part = self.objective(self.token_stats(local, nll, slice(i, i + 1)))
            parts.append(part)
            return part.loss_sum

        with hook.loss_by_sequence(loss_of_sequence):
            loss_sum = self._run(local, model)
        assert len(parts) == len(local["labels"]), "the objective must run once a sample"
        return loss_sum, lambda output: _for_schedule(_add(output, parts))

    def loss(self, local: Batch, nll: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum, integer count, report) as Megatron's schedule takes them. A report is [numerator, denominator].

        nll: [b, s/cp], or [2, b, s/cp] with the KL for an objective that distils.
        """
        if self._needs_hidden:
            nll, local = nll[0], {**local, "kl": nll[1]}
        return _for_schedule(self.objective(self.token_stats(local, nll.float())))

    def token_stats(self, local: Batch, nll: Tensor, samples: slice = slice(None)) -> TokenStats:
        """What an objective takes, of some samples of a rank's batch; nll [.., s/cp] is of these samples only."""
        known = ("ref_nll", "segment_ids", "sample_id", "selected", "kl")
        parts: Any = {key: local[key][samples] for key in known if key in local}
        mask = local["loss_mask"][samples].float()
        position = {"positions": self._positions(mask), "cp_group": self.groups.cp}
        return TokenStats(nll=nll, mask=mask, step=self.step, **position, **parts)

    def _forward(self, batch: Batch, model: Any) -> tuple[Tensor, Batch]:
        """Slice the batch for this context-parallel rank and run the model; returns its output and the slice."""
        local = self.local_batch(batch, model)
        return self._run(local, model), local

    def local_batch(self, batch: Batch, model: Any) -> Batch:
        """This context-parallel rank's part of the batch, on the model's device; `documents` stays whole."""
        hook = unwrap(model)
        self._check(hook)
        device = hook.device_of_weights()
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        whole = {"documents": batch.pop("documents")} if "documents" in batch else {}
        # Computed on this rank, so cut already; they replace what came with the batch.
        whole |= {k.removesuffix("_local"): batch.pop(k) for k in tuple(batch) if k.endswith("_local")}
        batch.setdefault(
            "position_ids", torch.arange(batch["tokens"].size(1), device=device).expand_as(batch["tokens"])
        )
        size, rank = self.groups.cp.size(), self.groups.cp.rank()
        local = {k: zigzag_slice(v, rank, size) if v.ndim == 2 else v for k, v in batch.items()}
        return local | whole

    def _run(self, local: Batch, model: Any, graph: Replayed | None = None) -> Tensor:
        hook = unwrap(model)

        def run(tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
            calls = hook.loss_calls
            output = model(tokens, position_ids, local.get("documents"), labels=labels)
            assert hook.loss_calls - calls == int(hook.post_process), "the loss hook must fire once a microbatch"
            return output

        masked = local["labels"].masked_fill(local["loss_mask"] == 0, -100)
        inputs = {"tokens": local["tokens"], "position_ids": local["position_ids"], "labels": masked}
        if graph is None:
            return run(**inputs)
        assert "documents" not in local, "a graph does not see the documents of a later batch"
        return graph(run, inputs)

    def _check(self, model: Any) -> None:
        """Refuse, once a model, the configurations that Megatron accepts and computes wrongly."""
        if model in self._checked:
            return
        if not isinstance(model, RemitGPTModel):
            raise UserError(f"the model must be a remit_megatron.mcore.RemitGPTModel, got {type(model).__name__}")
        config = model.config
        if not config.calculate_per_token_loss:
            raise UserError(
                "TransformerConfig.calculate_per_token_loss must be True: the other normalisation is inexact with "
                "ragged loss masks and with context parallelism"
            )
        if self.groups.pp.size() == 2 and config.virtual_pipeline_model_parallel_size and config.batch_p2p_comm:
            raise UserError(
                "pipeline 2 with virtual stages needs overlap_p2p_comm=True and batch_p2p_comm=False: batched p2p "
                "mixes activations and gradients silently"
            )
        self._checked.add(model)


def run_schedule(
    forward_step: Callable[..., Any], batches: list[Batch], chunks: list[Any], *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """One pass of Megatron's schedule over `batches`; returns the last stage's reports, one a microbatch.

    Raises nothing of its own. Forward-only does not stop autograd: wrap it in torch.no_grad().
    """
    samples, sequence_length = batches[0]["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=schedule_iterators(batches, chunks),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=samples,
        forward_only=forward_only,
    )


def schedule_iterators(batches: list[Batch], chunks: list[Any] | Any) -> Any:
    """One iterator, or a list with one for each model chunk: an interleaved schedule reads every batch once a chunk."""
    if isinstance(chunks, list) and len(chunks) > 1:
        return [iter(batches) for _ in chunks]
    return iter(batches)


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and Float16Module."""
    while not isinstance(model, RemitGPTModel) and hasattr(model, "module"):
        model = model.module
    return model


def _keep(results: list[Tensor], local: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As a schedule's loss function, for passes whose outputs are what is wanted: adds them to `results`."""
    results.append(output.detach().float())
    return output.sum(), local["loss_mask"].sum().int(), {}


def _for_schedule(out: LossSum) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return out.loss_sum, out.num_tokens, {name: torch.stack([m.num, m.den]) for name, m in out.metrics.items()}


def _add(loss_sum: Tensor, parts: list[LossSum]) -> LossSum:
    """Counts and metrics of samples added up, with the loss sum that carries their gradients."""
    metrics = {name: functools.reduce(operator.add, (p.metrics[name] for p in parts)) for name in parts[0].metrics}
    num_tokens = functools.reduce(operator.add, (p.num_tokens for p in parts))
    return LossSum(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return dict(batches[0])
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
