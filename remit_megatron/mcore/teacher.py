"""The frozen reference's pass over a step's microbatches, and what an objective is given of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.errors import UserError
from remit_megatron.mcore import passes
from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.groups import Groups
from remit_megatron.mcore.loss_hook import LossHook
from remit_megatron.objectives import Need, Objective
from remit_megatron.objectives.needs import OF_THE_DISTRIBUTION, OF_THE_REFERENCE
from remit_megatron.ops.distillation import Teacher
from remit_megatron.ops.distillation_kept import KeptTeacher
from remit_megatron.ops.score_quanta import round_to_quanta
from remit_megatron.ops.shard import IGNORED_LABEL
from remit_megatron.ops.top_tokens import TopTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenReference:
    """A reference in the student's own groups, which scores a step's microbatches forward-only, without logits."""

    chunks: Sequence[Any]
    """This rank's, each a RemitGPTModel with `scorer=True`. Empty: there is none, and scores come with the batches."""
    groups: Groups
    merge_microbatches: int = 1
    """How many microbatches go through it in one pass."""
    round_scores: bool = False
    """Round the NLL to the quanta of scores on disk."""
    common_vocab: int | None = None
    """Rows of the vocabulary that student and reference both have: the distribution is over them. None: the student
    has the reference's."""
    graph: Replayed | None = None
    """Replays the NLL's pass; without model parallelism and documents only."""
    top_k: int = 0
    """Above 0: of its distributions so many tokens are kept, as on disk, and no hidden states."""

    @torch.no_grad()
    def scored(self, microbatches: Sequence[Microbatch], objective: Objective) -> list[Microbatch]:
        """The microbatches with what `objective` needs of the reference, on last-stage ranks. Collective.

        Those that have it are returned as they are. Raises UserError where it is needed and cannot be had.
        """
        if has_scores(microbatches[0], objective):
            return list(microbatches)
        if self.top_k:
            return self._kept(microbatches, objective)
        needs = objective.needs
        self._check_chunks(objective)
        found: dict[str, list[Any]] = {}
        if needs & OF_THE_DISTRIBUTION:
            hidden = passes.hidden(self.chunks, microbatches, self.groups, merge=self.merge_microbatches)
            found |= self._of_distribution(microbatches, hidden, objective)
        if Need.REF_NLL in needs:
            nll = passes.nll(self.chunks, microbatches, self.groups, merge=self.merge_microbatches, graph=self.graph)
            found["ref_nll"] = [round_to_quanta(one) for one in nll] if self.round_scores else nll
        if not self.groups.is_last_stage:
            return list(microbatches)
        return [
            one.with_scores(
                dataclasses.replace(one.scores or Scores(), **{name: values[i] for name, values in found.items()})
            )
            for i, one in enumerate(microbatches)
        ]

    def _check_chunks(self, objective: Objective) -> None:
        if not self.chunks:
            missing = "ref_nll" if Need.REF_NLL in objective.needs else "the reference's distribution"
            raise UserError(
                f"objective '{objective.name}' needs {missing}: give make_forward_step a reference, or put scores "
                "into the batches"
            )

    def _kept(self, microbatches: Sequence[Microbatch], objective: Objective) -> list[Microbatch]:
        """With all that is kept of a distribution, whatever part of it the objective needs."""
        self._check_chunks(objective)
        hidden = passes.hidden(self.chunks, microbatches, self.groups, merge=self.merge_microbatches)
        if not self.groups.is_last_stage:
            return list(microbatches)
        deal = self.groups.deal()
        labels = [deal.cut(one.labels.masked_fill(one.loss_mask == 0, IGNORED_LABEL)) for one in microbatches]
        found = passes.summaries(
            self.chunks,
            hidden,
            [one.to(states.device) for one, states in zip(labels, hidden, strict=True)],
            top_k=self.top_k,
            temperature=objective.distribution.temperature,
        )
        if self.round_scores:
            found = [dataclasses.replace(one, ref_nll=_rounded(one.ref_nll)) for one in found]
        return [one.with_scores(scores) for one, scores in zip(microbatches, found, strict=True)]

    def _of_distribution(
        self, microbatches: Sequence[Microbatch], hidden: list[Tensor], objective: Objective
    ) -> dict[str, list[Tensor]]:
        """What the objective needs of the distributions that follow from hidden states; on other stages nothing."""
        needs, found = objective.needs, dict[str, list[Tensor]]()
        if not self.groups.is_last_stage:
            return found
        if Need.DISTRIBUTION in needs:
            found["hidden"] = hidden
        # What a script has put into the batches is not made again.
        missing = needs & {Need.ENTROPY, Need.AGREEMENT} - _given(microbatches[0].scores or Scores())
        if missing:
            deal = self.groups.deal()
            both = passes.entropy_and_agreement(
                self.chunks,
                hidden,
                [deal.cut(one.labels) for one in microbatches],
                temperature=objective.distribution.temperature,
                common_vocab=self.common_vocab,
            )
            if Need.ENTROPY in missing:
                found["entropy"] = [entropy for entropy, _ in both]
            if Need.AGREEMENT in missing:
                found["agrees"] = [agrees for _, agrees in both]
        return found

    def teacher(self, scores: Scores | None, objective: Objective, student: LossHook) -> Teacher | KeptTeacher:
        """The distribution of the microbatch that `scores` are of, as `objective` compares it with `student`'s."""
        if scores is not None and scores.top is not None:
            return kept_teacher(scores.top, objective)
        if not self.chunks:
            raise UserError(
                f"objective '{objective.name}' needs the reference's head: give make_forward_step a reference"
            )
        how = objective.distribution
        return passes.teacher_of(
            self.chunks, student, scores, temperature=how.temperature, top_k=how.top_k, compare=how.compare
        )


def kept_teacher(top: TopTokens, objective: Objective) -> KeptTeacher:
    """top: [b, s/cp, K] and [b, s/cp], at the temperature at which the objective compares."""
    how = objective.distribution
    assert how.top_k in (0, top.ids.shape[-1]), f"{top.ids.shape[-1]} tokens are kept, and {how.top_k} wanted"
    turned = TopTokens(ids=top.ids.transpose(0, 1), log_probs=top.log_probs.transpose(0, 1), log_tail=top.log_tail.t())
    return KeptTeacher(top=turned, temperature=how.temperature, compare=how.compare)


def _rounded(ref_nll: Tensor | None) -> Tensor | None:
    return None if ref_nll is None else round_to_quanta(ref_nll)


def has_scores(microbatch: Microbatch, objective: Objective) -> bool:
    """Whether a microbatch has, on a rank that computes the loss, all that its objective needs of the reference."""
    return objective.needs & OF_THE_REFERENCE <= _given(microbatch.scores or Scores())


def _given(scores: Scores) -> frozenset[Need]:
    """What scores serve."""
    fields = {
        Need.REF_NLL: scores.ref_nll,
        Need.DISTRIBUTION: scores.hidden if scores.top is None else scores.top,
        Need.ENTROPY: scores.entropy,
        Need.AGREEMENT: scores.agrees,
    }
    return frozenset(need for need, value in fields.items() if value is not None)
