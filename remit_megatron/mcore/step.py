"""Score, then train: the forward step that Megatron's schedules call.

A step's microbatches are read once. The frozen reference runs over them forward-only, through Megatron's own schedule
(so any pipeline layout works), and each microbatch keeps its scores on the ranks that compute the loss. Then the
ordinary training schedule runs with the same microbatches. Scores that are already in a batch are used as they are.
"""

import contextlib
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remit_megatron.data.microbatch import LocalMicrobatch, Microbatch, Scores
from remit_megatron.errors import UserError
from remit_megatron.mcore import passes
from remit_megatron.mcore.attention import SDPAttention
from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.groups import Groups, current_groups
from remit_megatron.mcore.heads import BySequence, Distilling
from remit_megatron.mcore.loss_hook import LossHook, unwrap
from remit_megatron.mcore.passes import LossFunction, Report, run_model, schedule_iterators
from remit_megatron.mcore.teacher import FrozenReference, has_scores
from remit_megatron.objectives import LossSum, Need, Objective, TokenStats, check_by_sample
from remit_megatron.ops.routing import route
from remit_megatron.ops.selection import top_share_of_all

Batch = Microbatch | Mapping[str, Any]
"""A microbatch, or the plain dict of a script of one's own, which `Microbatch.from_dict` reads."""


def make_forward_step(
    objective: Objective,
    reference: Any = None,
    *,
    groups: Groups | None = None,
    merge_microbatches: int = 1,
    round_scores: bool = False,
    graph: Replayed | None = None,
    sequence_length: int | None = None,
    common_vocab: int | None = None,
) -> "ForwardStep":
    """A forward step for Megatron's schedules that trains with `objective`.

    reference: the frozen RemitGPTModel (`scorer=True`), a rank's list of its chunks, or None when the objective needs
    none or batches carry scores. merge_microbatches: how many microbatches the reference scores in one pass.
    round_scores: round `ref_nll` to the quanta of scores on disk. graph: replays the reference's pass; without model
    parallelism and documents only. sequence_length: of whole samples; a batch of another length is refused, as one
    that was cut for context parallelism before has.
    Use `prepare` before each step's schedule. Without pipelining it may be left out: then the reference runs inside
    the step, before the student.
    """
    chunks = reference if isinstance(reference, list) else [reference] if reference is not None else []
    groups = groups or current_groups()
    frozen = FrozenReference(
        chunks=chunks,
        groups=groups,
        merge_microbatches=merge_microbatches,
        round_scores=round_scores,
        common_vocab=common_vocab,
        graph=graph,
    )
    return ForwardStep(objective, frozen, groups, sequence_length)


class ForwardStep:
    """Called by the schedule as `forward_step(data_iterator, model)`; see `make_forward_step`."""

    def __init__(
        self, objective: Objective, reference: FrozenReference, groups: Groups, sequence_length: int | None = None
    ):
        self.objective = objective
        self.reference = reference
        self.groups = groups
        self.sequence_length = sequence_length
        self.step = 0
        """Number of the optimizer step, for objectives that draw random numbers; the training loop sets it."""
        self._deal = groups.deal()

    def prepare(self, data_iterator: Iterator[Batch], num_microbatches: int, chunks: Any) -> Any:
        """Read a step's microbatches, score them where the objective needs it, and return the schedule's data_iterator.

        chunks: the student's model chunks on this rank, or its one model.
        """
        microbatches = [self.microbatch(next(data_iterator)) for _ in range(num_microbatches)]
        microbatches = self.scored(microbatches)
        microbatches = self.selected(microbatches, chunks if isinstance(chunks, list) else [chunks])
        return schedule_iterators(microbatches, chunks)

    def microbatch(self, batch: Batch) -> Microbatch:
        """The one place where a plain dict is taken. Raises UserError for a batch that cannot be what it should."""
        if not isinstance(batch, Microbatch):
            batch = Microbatch.from_dict(batch, self._deal)
        if self.sequence_length not in (None, batch.length):
            raise UserError(
                f"the batch has {batch.length} positions, and whole samples have sequence_length = "
                f"{self.sequence_length}: give these, which the forward step cuts for context parallelism itself"
            )
        return batch

    def scored(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """With the reference's scores where the objective needs them, on last-stage ranks. Collective."""
        return self.reference.scored(microbatches, self.objective)

    @torch.no_grad()
    def selected(self, microbatches: Sequence[Microbatch], chunks: Sequence[Any]) -> list[Microbatch]:
        """For an objective whose tokens are chosen before the step: with `selected` or `routed`, on last-stage ranks.
        Collective.

        With Need.GLOBAL_SELECTION the student, this rank's chunks, runs forward-only over the scored microbatches
        first; for any other objective nothing runs.
        """
        if Need.ROUTING in self.objective.needs:
            return self._routed(microbatches, chunks)
        share = self.objective.global_share
        if Need.GLOBAL_SELECTION not in self.objective.needs or share is None:
            return list(microbatches)
        scores = passes.nll(chunks, microbatches, self.groups, merge=self.reference.merge_microbatches)
        if not self.groups.is_last_stage:
            return list(microbatches)
        local = [self.local(one, chunks[-1]) for one in microbatches]
        sample_ids = self._sample_ids(local)
        ref_nll = [one.scores.ref_nll for one in local if one.scores is not None and one.scores.ref_nll is not None]
        selected = top_share_of_all(
            [nll.double() - one.double() for nll, one in zip(scores, ref_nll, strict=True)],
            [one.loss_mask for one in local],
            share,
            sample_ids=sample_ids,
            positions=local[0].positions,
            group=self.groups.dp_cp,
        )
        return [one.with_selected(chosen) for one, chosen in zip(microbatches, selected, strict=True)]

    def _routed(self, microbatches: Sequence[Microbatch], chunks: Sequence[Any]) -> list[Microbatch]:
        routing = self.objective.routing
        assert routing is not None, "an objective that needs routing says which"
        if not self.groups.is_last_stage:
            return list(microbatches)
        local = [self.local(one, chunks[-1]) for one in microbatches]
        scores = [one.scores or Scores() for one in local]
        routed = route(
            routing,
            [one.entropy for one in scores if one.entropy is not None],
            [one.agrees for one in scores if one.agrees is not None],
            [one.loss_mask for one in local],
            sample_ids=self._sample_ids(local),
            positions=local[0].positions,
            step=self.step,
            cp_group=self.groups.cp,
            group=self.groups.dp_cp,
        )
        return [one.with_routed(chosen) for one, chosen in zip(microbatches, routed, strict=True)]

    def _sample_ids(self, local: Sequence[LocalMicrobatch]) -> list[Tensor]:
        found = [one.sample_id for one in local if one.sample_id is not None]
        if len(found) < len(local):
            raise UserError(f"objective '{self.objective.name}' chooses among tokens: it needs sample_id in each batch")
        return found

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, LossFunction]:
        given, hook = next(data_iterator), passes.checked(model, self.groups)
        microbatch = self.microbatch(given)
        _check_batch(microbatch, hook)
        if self.groups.is_last_stage:
            microbatch = self._complete(microbatch)
        local = microbatch.local(self._deal, hook.device_of_weights())
        if hook.post_process and hook.by_sequence:
            return self._by_sequence(local, model)
        with self._distilling(local, hook):
            output = run_model(local, model)
        return output, functools.partial(self.loss, local)

    def _complete(self, microbatch: Microbatch) -> Microbatch:
        """Scored here where `prepare` was left out. Raises UserError where it may not be."""
        if not has_scores(microbatch, self.objective):
            if self.groups.pp.size() > 1:
                raise UserError("with pipeline parallelism call forward_step.prepare(...) before each step's schedule")
            (microbatch,) = self.scored([microbatch])
        if Need.GLOBAL_SELECTION in self.objective.needs and microbatch.selected is None:
            raise UserError("with scope = 'global' call forward_step.prepare(...) before each step's schedule")
        if Need.ROUTING in self.objective.needs and microbatch.routed is None:
            raise UserError(
                f"for objective '{self.objective.name}' call forward_step.prepare(...) before each step's schedule"
            )
        return microbatch

    def _distilling(self, local: LocalMicrobatch, hook: LossHook) -> contextlib.AbstractContextManager[None]:
        """Hands the reference's distribution of this microbatch to the head where the objective needs it."""
        if Need.DISTRIBUTION not in self.objective.needs or not hook.post_process:
            return contextlib.nullcontext()
        compared = None if local.routed is None else local.routed.compared
        return hook.using(Distilling(self.reference.teacher(local.scores, self.objective, hook), compared))

    def _by_sequence(self, local: LocalMicrobatch, model: Any) -> tuple[Tensor, LossFunction]:
        """The model runs the objective itself, sample by sample, and its output is the loss sum."""
        check_by_sample(self.objective)
        parts: list[LossSum] = []

        def loss_of_sequence(i: int, nll: Tensor) -> Tensor:
            part = self.objective(self.token_stats(local, nll, samples=slice(i, i + 1)))
            parts.append(part)
            return part.loss_sum

        with unwrap(model).using(BySequence(loss_of_sequence)):
            loss_sum = run_model(local, model)
        assert len(parts) == len(local.labels), "the objective must run once a sample"
        return loss_sum, lambda output: _for_schedule(_add(output, parts))

    def loss(self, local: LocalMicrobatch, output: Tensor) -> tuple[Tensor, Tensor, Report]:
        """(sum, integer count, report) as Megatron's schedule takes them. A report is [numerator, denominator].

        output: the NLL [b, s/cp], or [2, b, s/cp] with the KL for an objective that distils.
        """
        nll, kl = (output[0], output[1]) if Need.DISTRIBUTION in self.objective.needs else (output, None)
        return _for_schedule(self.objective(self.token_stats(local, nll.float(), kl=kl)))

    def token_stats(
        self, local: LocalMicrobatch, nll: Tensor, *, kl: Tensor | None = None, samples: slice = slice(None)
    ) -> TokenStats:
        """What an objective takes, of some samples of a rank's microbatch; nll and kl [.., s/cp] are of these only."""
        scores = local.scores or Scores()

        def of_samples(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[samples]

        return TokenStats(
            nll=nll,
            ref_nll=of_samples(scores.ref_nll),
            mask=local.loss_mask[samples].float(),
            segment_ids=of_samples(local.segment_ids),
            cp_group=self.groups.cp,
            positions=local.positions,
            sample_id=of_samples(local.sample_id),
            step=self.step,
            kl=kl,
            ref_entropy=of_samples(scores.entropy),
            ref_agrees=of_samples(scores.agrees),
            selected=of_samples(local.selected),
            routed=local.routed,
        )

    def local(self, microbatch: Microbatch, model: Any) -> LocalMicrobatch:
        """This rank's part of a microbatch, on a model chunk's device."""
        return microbatch.local(self._deal, unwrap(model).device_of_weights())


def _check_batch(microbatch: Microbatch, hook: LossHook) -> None:
    """Raises UserError for what the model would train without. Waits for the device where position_ids are given."""
    if microbatch.documents is not None:
        for layer in hook.decoder.layers:
            core = getattr(layer.self_attention, "core_attention", None)  # a hybrid model's MLP is a layer without
            if core is not None and not isinstance(core, SDPAttention):
                raise UserError(
                    f"the batch has `documents`, which the layers' core attention {type(core).__name__} does not read: "
                    "build them with remit_megatron.mcore.attention.SDPAttention, or leave `documents` out"
                )
    given, kind = microbatch.position_ids, hook.position_embedding_type
    if given is None or kind in ("learned_absolute", "mrope"):
        return
    if not torch.equal(given, torch.arange(microbatch.length, device=given.device).expand_as(given)):
        raise UserError(
            f"the batch's 'position_ids' are not 0..s-1, and position_embedding_type = '{kind}' does not read them: "
            "leave them out (GPTDatasetConfig.reset_position_ids = False); `documents` keep attention inside documents"
        )


def _for_schedule(out: LossSum) -> tuple[Tensor, Tensor, Report]:
    return out.loss_sum, out.num_tokens, {name: torch.stack([m.num, m.den]) for name, m in out.metrics.items()}


def _add(loss_sum: Tensor, parts: list[LossSum]) -> LossSum:
    """Counts and metrics of samples added up, with the loss sum that carries their gradients."""
    metrics = {name: functools.reduce(operator.add, (p.metrics[name] for p in parts)) for name in parts[0].metrics}
    num_tokens = functools.reduce(operator.add, (p.num_tokens for p in parts))
    return LossSum(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)
