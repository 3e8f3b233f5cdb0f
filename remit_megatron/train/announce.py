"""What a run says of itself at its start."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from remit_megatron.config import Recipe
from remit_megatron.mcore.datasets import SourceSamples
from remit_megatron.mcore.groups import Groups
from remit_megatron.objectives import Objective
from remit_megatron.run.build_plan import BuildPlan


def start_lines(
    *,
    recipe: Recipe,
    plan: BuildPlan,
    objective: Objective,
    groups: Groups,
    device: torch.device,
    num_microbatches: int,
    scores: Path | None,
    sources: Sequence[SourceSamples],
    resume: Path | None,
) -> Iterator[str]:
    """Model and start, layout, remarks of the objective, where scores come from, warnings of the datasets.

    scores: the folder that they are read from. resume: the checkpoint that the run goes on from.
    """
    start = f"resumes from {resume.name}" if resume else f"starts from {plan.init or 'random weights'}"
    yield f"{recipe.run}: {objective.name}, {plan.shape.num_parameters() / 1e6:,.1f}M parameters, {start}"
    p = recipe.parallel
    yield (
        f"{groups.world_size} ranks on {device.type}: tensor {p.tensor}, pipeline {p.pipeline} x "
        f"{p.virtual_pipeline}, context {p.context}, data {groups.dp.size()}; {num_microbatches} microbatches a step"
    )
    remark = getattr(objective, "remark", None)
    if remark:
        yield remark
    if scores:
        yield f"the reference's scores come from {scores}"
    for source in sources:
        for warning in source.info.warnings:
            yield f"warning: {warning}"
