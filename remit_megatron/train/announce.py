"""What a run says of itself at its start."""

from collections.abc import Iterator

from remit_megatron.mcore import datasets
from remit_megatron.scores.cached import Cached
from remit_megatron.scores.kept import Kept
from remit_megatron.scores.precision import precision_error
from remit_megatron.train.setup import SetUp
from remit_megatron.train.student import Student


def start_lines(parts: SetUp) -> Iterator[str]:
    """What was passed over, model and start, layout, remarks of the objective, where scores come from, warnings of the
    datasets."""
    ready, objective = parts.ready, parts.objective
    recipe, plan, p = ready.recipe, ready.plan, ready.recipe.parallel
    for path, problem in parts.passed_over.items():
        yield f"--fallback: {path.name} is passed over and set aside: {problem}"
    start = f"resumes from {plan.resume.name}" if plan.resume else f"starts from {plan.init or 'random weights'}"
    yield from parts.remarks
    yield f"{recipe.run}: {objective.name}, {plan.shape.num_parameters() / 1e6:,.1f}M parameters, {start}"
    yield (
        f"{ready.groups.world_size} ranks on {ready.process.device.type}: tensor {p.tensor}, pipeline {p.pipeline} x "
        f"{p.virtual_pipeline}, context {p.context}, data {ready.groups.dp.size()}; {parts.num_microbatches} "
        "microbatches a step"
    )
    if objective.remark:
        yield objective.remark
    if isinstance(parts.source, Cached):
        yield f"the reference's scores come from {parts.source.cache.folder}"
    if isinstance(parts.source, Cached | Kept) and (remark := parts.source.cache.remark()):
        yield f"warning: {remark}"
    for source in ready.data.sources:
        for warning in source.info.warnings:
            yield f"warning: {warning}"


def precision_lines(parts: SetUp, student: Student) -> list[str]:
    """What FP8 does to the reference's scores, measured on a microbatch of the first step; nothing where it has its
    own precision. Collective."""
    ready, reference = parts.ready, parts.reference
    if reference is None or not reference.products:
        return []
    count = min(ready.recipe.parallel.pipeline, parts.num_microbatches)
    microbatches = datasets.microbatches(ready.data, 0, count, ready.deal)
    errors = precision_error(reference, parts.forward_step, student.complete(), microbatches)
    return [
        f"reference in fp8: error of {name} {error.rms:.2e} rms, {error.largest:.2e} at most, over "
        f"{error.tokens:,} tokens"
        for name, error in errors.items()
    ]
