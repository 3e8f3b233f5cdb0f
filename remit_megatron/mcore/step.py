"""Score, then train: the forward step that Megatron's schedules call, and the reference's pass before it.

A step's microbatches are read once. The frozen reference runs over them forward-only, through Megatron's own schedule
(so any pipeline layout works), and each microbatch keeps its `ref_nll` on the ranks that compute the loss. Then the
ordinary training schedule runs with the same microbatches. Scores that are already in a batch are used as they are.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.attention import zigzag_slice
from remit_megatron.mcore.groups import Groups, current_groups
from remit_megatron.mcore.loss_hook import RemitGPTModel
from remit_megatron.objectives import Objective
from remit_megatron.objectives.base import TokenStats

Batch = dict[str, Tensor]
"""One microbatch, the whole sample on every rank. All [b, s]:

tokens, labels   int64
loss_mask        1 where the label is trained on, 0 elsewhere
position_ids     int64; default 0..s-1
segment_ids      int64, the document of each label within its sample, for document centring; optional
documents        int64, the document of each input token, for attention inside documents; optional
ref_nll          float32, nats, scores made ahead; optional
sample_id        int64 [b], optional, not used here
"""


def make_forward_step(
    objective: Objective,
    reference: Any = None,
    *,
    groups: Groups | None = None,
    merge_microbatches: int = 1,
) -> "ForwardStep":
    """A forward step for Megatron's schedules that trains with `objective`.

    reference: the frozen RemitGPTModel (`scorer=True`), a rank's list of its chunks, or None when the objective needs
    none or batches carry `ref_nll`. merge_microbatches: how many microbatches the reference scores in one pass.
    Use `prepare` before each step's schedule. Without pipelining it may be left out: then the reference runs inside
    the step, before the student.
    """
    chunks = reference if isinstance(reference, list) else [reference] if reference is not None else []
    return ForwardStep(objective, chunks, groups or current_groups(), merge_microbatches)


class ForwardStep:
    """Called by the schedule as `forward_step(data_iterator, model)`; see `make_forward_step`."""

    def __init__(self, objective: Objective, reference: list[Any], groups: Groups, merge_microbatches: int = 1):
        self.objective = objective
        self.reference = reference
        self.groups = groups
        self.merge_microbatches = merge_microbatches
        self._checked: set[int] = set()

    def prepare(self, data_iterator: Iterator[Batch], num_microbatches: int, chunks: list[Any] | Any) -> Any:
        """Read a step's microbatches, score them where the objective needs it, and return the schedule's data_iterator.

        chunks: the student's model chunks on this rank, for the number of iterators the schedule expects.
        """
        batches = [dict(next(data_iterator)) for _ in range(num_microbatches)]
        if self.objective.needs_reference and "ref_nll" not in batches[0]:
            self.score(batches)
        return schedule_iterators(batches, chunks)

    @torch.no_grad()
    def score(self, batches: list[Batch]) -> None:
        """Run the reference over `batches` and add `ref_nll_local` [b, s/cp] to each, on last-stage ranks."""
        if not self.reference:
            raise UserError(
                f"objective '{self.objective.name}' needs ref_nll: give make_forward_step a reference, or put scores "
                "into the batches"
            )
        k = self.merge_microbatches
        merged = [_concatenate(batches[i : i + k]) for i in range(0, len(batches), k)]
        if len({len(b["tokens"]) for b in merged}) > 1:  # p2p shapes are fixed within one schedule run
            merged, k = [_concatenate([b]) for b in batches], 1
        scores: list[Tensor] = []
        run_schedule(functools.partial(self._score_step, scores), merged, self.reference, forward_only=True)
        if self.groups.is_last_stage:
            sizes = [len(b["tokens"]) for b in batches]
            for batch, ref_nll in zip(batches, torch.cat(scores).split(sizes), strict=True):
                batch["ref_nll_local"] = ref_nll

    def _score_step(self, scores: list[Tensor], iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        nll, local = self._forward(next(iterator), model)

        def keep(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            scores.append(output.detach().float())
            return output.sum(), local["loss_mask"].sum().int(), {}

        return nll, keep

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data_iterator)
        inline = self.objective.needs_reference and "ref_nll" not in batch and "ref_nll_local" not in batch
        if inline and self.groups.is_last_stage:
            if self.groups.pp.size() > 1:
                raise UserError("with pipeline parallelism call forward_step.prepare(...) before each step's schedule")
            batch = dict(batch)
            self.score([batch])
        output, local = self._forward(batch, model)
        return output, functools.partial(self.loss, local)

    def loss(self, local: Batch, nll: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum, integer count, report) as Megatron's schedule takes them. A report is [numerator, denominator]."""
        stats = TokenStats(
            nll=nll.float(),
            ref_nll=local.get("ref_nll"),
            mask=local["loss_mask"].float(),
            segment_ids=local.get("segment_ids"),
            cp_group=self.groups.cp,
        )
        out = self.objective(stats)
        report = {name: torch.stack([m.num, m.den]) for name, m in out.metrics.items()}
        return out.loss_sum, out.num_tokens, report

    def _forward(self, batch: Batch, model: Any) -> tuple[Tensor, Batch]:
        """Slice the batch for this context-parallel rank and run the model; returns its output and the slice."""
        hook = unwrap(model)
        self._check(hook)
        device = hook.device_of_weights()
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        documents, ref_nll = batch.pop("documents", None), batch.pop("ref_nll_local", None)
        batch.setdefault(
            "position_ids", torch.arange(batch["tokens"].size(1), device=device).expand_as(batch["tokens"])
        )
        size, rank = self.groups.cp.size(), self.groups.cp.rank()
        local = {k: zigzag_slice(v, rank, size) if v.ndim == 2 else v for k, v in batch.items()}
        if ref_nll is not None:
            local["ref_nll"] = ref_nll
        masked = local["labels"].masked_fill(local["loss_mask"] == 0, -100)
        calls = hook.loss_calls
        output = model(local["tokens"], local["position_ids"], documents, labels=masked)
        assert hook.loss_calls - calls == int(hook.post_process), "the loss hook must fire once a microbatch"
        return output, local

    def _check(self, model: Any) -> None:
        """Refuse, once a model, the configurations that Megatron accepts and computes wrongly."""
        if id(model) in self._checked:
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
                "pipeline 2 with virtual stages needs overlap_p2p_comm=True and batch_p2p_comm=False: batched p2p mixes "
                "activations and gradients silently"
            )
        self._checked.add(id(model))


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


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return dict(batches[0])
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
