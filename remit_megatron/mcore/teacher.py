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
from remit_megatron.objectives import Need, Objective
from remit_megatron.ops.distillation import Teacher
from remit_megatron.ops.score_quanta import round_to_quanta


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
    graph: Replayed | None = None
    """Replays the NLL's pass; without model parallelism and documents only."""

    @torch.no_grad()
    def scored(self, microbatches: Sequence[Microbatch], objective: Objective) -> list[Microbatch]:
        """The microbatches with what `objective` needs of the reference, on last-stage ranks. Collective.

        Those that have it are returned as they are. Raises UserError where it is needed and cannot be had.
        """
        if has_scores(microbatches[0], objective):
            return list(microbatches)
        needs, has = objective.needs, microbatches[0].scores or Scores()
        if Need.ENTROPY in needs and has.entropy is None:
            raise UserError(
                f"objective '{objective.name}' needs the reference's entropy: put Scores.entropy into the microbatches"
            )
        if not self.chunks:
            missing = "ref_nll" if Need.REF_NLL in needs else "the reference's distribution"
            raise UserError(
                f"objective '{objective.name}' needs {missing}: give make_forward_step a reference, or put scores "
                "into the batches"
            )
        found: dict[str, list[Tensor]] = {}
        if Need.DISTRIBUTION in needs:
            found["hidden"] = passes.hidden(self.chunks, microbatches, self.groups, merge=self.merge_microbatches)
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

    def teacher(self, scores: Scores | None, objective: Objective) -> Teacher:
        """The distribution of the microbatch that `scores` are of, as `objective` compares it."""
        if not self.chunks:
            raise UserError(
                f"objective '{objective.name}' needs the reference's head: give make_forward_step a reference"
            )
        how = objective.distribution
        return passes.teacher_of(self.chunks, scores, temperature=how.temperature, top_k=how.top_k)


def has_scores(microbatch: Microbatch, objective: Objective) -> bool:
    """Whether a microbatch has, on a rank that computes the loss, all that its objective needs of the reference."""
    scores, needs = microbatch.scores or Scores(), objective.needs
    return (
        (Need.REF_NLL not in needs or scores.ref_nll is not None)
        and (Need.DISTRIBUTION not in needs or scores.hidden is not None)
        and (Need.ENTROPY not in needs or scores.entropy is not None)
    )
