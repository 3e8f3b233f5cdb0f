"""What a reference in FP8 costs in accuracy: the error of its scores, and of the weights that they give."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.data.microbatch import Microbatch
from remit_megatron.mcore import fp8, passes
from remit_megatron.mcore.step import ForwardStep
from remit_megatron.objectives import Remit
from remit_megatron.run.process import largest_of_ranks
from remit_megatron.run.reference import Reference


class Error(NamedTuple):
    """Over the unmasked tokens of all ranks."""

    rms: float
    largest: float
    tokens: int


@torch.no_grad()
def precision_error(
    reference: Reference, step: ForwardStep, student: list[Any], microbatches: list[Microbatch]
) -> dict[str, Error]:
    """Errors of `ref_nll`, in nats, and under ReMiT of `weight`, of FP8 against the reference in its own precision.

    Scores the microbatches in both, with the student as it is. Collective; every rank gets the result.
    """
    merge = step.reference.merge_microbatches

    def nll_of(chunks: list[Any]) -> list[Tensor]:
        return passes.nll(chunks, microbatches, step.groups, merge=merge)

    low = nll_of(reference.chunks)
    with fp8.disabled(reference.products):
        exact = nll_of(reference.chunks)
    own = nll_of(student)
    errors: dict[str, list[Tensor]] = {"ref_nll": []}
    for i, microbatch in enumerate(microbatches if step.groups.is_last_stage else ()):
        stats = step.token_stats(step.local(microbatch, student[-1]), own[i])
        kept = stats.mask > 0
        errors["ref_nll"].append((low[i] - exact[i])[kept])
        if isinstance(step.objective, Remit):
            weights = [step.objective.weights(replace(stats, ref_nll=score[i])) for score in (low, exact)]
            errors.setdefault("weight", []).append((weights[0] - weights[1])[kept])
    names = ["ref_nll", *(["weight"] if isinstance(step.objective, Remit) else [])]
    return {name: _over_ranks(errors.get(name, []), step.groups.counts_loss, reference.device) for name in names}


def _over_ranks(values: list[Tensor], counted: bool, device: torch.device) -> Error:
    mine = torch.cat(values).double() if values and counted else torch.zeros(0, dtype=torch.float64, device=device)
    sums = torch.stack([mine.square().sum(), mine.new_tensor(float(len(mine)))])
    largest = mine.abs().amax() if len(mine) else mine.new_zeros(())
    dist.all_reduce(sums)
    squares, count = sums.tolist()
    return Error(math.sqrt(squares / max(count, 1)), largest_of_ranks(largest), int(count))
