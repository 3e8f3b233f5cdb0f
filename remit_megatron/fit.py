"""Whether a layout fits a recipe, its models and a number of ranks: arithmetic, with neither tensors nor groups.

`remit plan`, `remit check` and a run that starts all decide here, so what one of them accepts the others accept.
"""

from remit_megatron.config import Parallel, Recipe
from remit_megatron.errors import UserError
from remit_megatron.objectives.needs import OF_THE_DISTRIBUTION
from remit_megatron.shape import ModelShape, check_layout


def check_fit(
    recipe: Recipe, shape: ModelShape, reference: ModelShape | None, *, device_type: str, num_ranks: int
) -> int:
    """Microbatches of a step on each data-parallel rank. Raises UserError for the first thing that does not fit.

    shape, reference: of the student and the frozen model. device_type: "cpu" or "cuda". A scorer beside the run may
    have a layout of its own; on how many ranks it starts is not known here.
    """
    check_models(recipe, shape, reference, device_type=device_type)
    if reference is not None and recipe.reference is not None and recipe.reference.queue is not None:
        check_layout(reference, recipe.for_scorer().parallel, "reference.queue: reference")
    return num_microbatches(recipe, num_ranks)


def check_models(recipe: Recipe, shape: ModelShape, reference: ModelShape | None, *, device_type: str) -> None:
    """Raise UserError, naming the key, where the models do not fit the layout, each other or the device."""
    check_layout(shape, recipe.parallel, "model")
    check_graph(recipe, device_type)
    check_document_mask(recipe)
    if reference is None:
        return
    kept = recipe.reference.distribution if recipe.reference is not None else 0
    if kept > reference.vocab_size:
        raise UserError(
            f"reference.distribution = {kept} is more than the {reference.vocab_size} tokens of the reference's "
            "vocabulary: choose fewer"
        )
    if kept and reference.vocab_size != shape.vocab_size:
        raise UserError(
            f"reference.distribution = {kept}: the reference's vocabulary has {reference.vocab_size} rows, the model's "
            f"{shape.vocab_size}, and what is kept is over all of the reference's: leave it out, so that the "
            "distributions are compared online, over the rows that both have"
        )
    check_layout(reference, recipe.parallel, "reference")


def data_parallel_size(parallel: Parallel, num_ranks: int) -> int:
    """Data-parallel ranks that `num_ranks` leaves. Raises UserError when the layout does not divide it."""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if num_ranks % model_ranks:
        raise UserError(
            f"{num_ranks} ranks do not divide by parallel.tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {model_ranks}: start with a multiple of it"
        )
    return num_ranks // model_ranks


def num_microbatches(recipe: Recipe, num_ranks: int) -> int:
    """Microbatches of a step on each data-parallel rank. Raises UserError, naming the key, when the batch does not
    divide, or what the reference scores at once does not."""
    dp = data_parallel_size(recipe.parallel, num_ranks)
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
    merged = recipe.reference.merge_microbatches if recipe.reference else 1
    if count % merged or (p.virtual_pipeline > 1 and (count // merged) % p.pipeline):
        raise UserError(
            f"reference.merge_microbatches = {merged} does not fit {count} microbatches a step: it must divide them"
            + (f", into a multiple of parallel.pipeline = {p.pipeline}" if p.virtual_pipeline > 1 else "")
        )
    return count


def check_document_mask(recipe: Recipe) -> None:
    """Raise UserError where models would take a mask of documents for another mask, or for none."""
    if recipe.data.document_mask and recipe.model.implementation == "transformer_engine":
        raise UserError(
            "data.document_mask needs model.implementation = 'local': Transformer Engine's takes no such mask here"
        )


def check_graph(recipe: Recipe, device_type: str) -> None:
    """Raise UserError naming the key for a recipe whose reference cannot be captured, or was never tried to be."""
    if recipe.reference is None or not recipe.reference.cuda_graph:
        return
    p = recipe.parallel
    reasons = {
        "compute.device = 'cuda'": device_type == "cuda",
        "model.implementation = 'local'": recipe.model.implementation == "local",
        "parallel.tensor, pipeline and context = 1": p.tensor == p.pipeline == p.context == 1,
        "data.document_mask = false": not recipe.data.document_mask,
        "an objective that takes scores": not recipe.objective.needs & OF_THE_DISTRIBUTION,
        "reference.distribution = 0": not recipe.reference.distribution,
    }
    unmet = [condition for condition, met in reasons.items() if not met]
    if unmet:
        raise UserError(f"reference.cuda_graph = true needs {'; '.join(unmet)}: remove the key, or change that")
