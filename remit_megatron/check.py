"""A recipe and the checkpoints and datasets it names, checked without starting ranks or allocating a model."""

from pathlib import Path

from remit_megatron.config import Recipe
from remit_megatron.data.files import check_place
from remit_megatron.data.manifest import end_of_document, quick_verify
from remit_megatron.data.sources import check_sources
from remit_megatron.device import resolve_device
from remit_megatron.fit import check_fit, num_microbatches
from remit_megatron.optional import check_optional_parts
from remit_megatron.presets import student_shape
from remit_megatron.run.build_plan import make_build_plan
from remit_megatron.run.fit import check_documents, check_tokenizers, recipe_tokenizer
from remit_megatron.run.folder import RunFolder
from remit_megatron.shape import check_layout


def check_start(recipe: Recipe, ranks: int) -> None:
    """What a start on so many ranks refuses at once, before torch is imported. Raises UserError.

    It reads the recipe and the run's folder only: all the rest is found by the run itself, on the ranks' own machines.
    """
    RunFolder(Path(recipe.run), recipe).check()
    if recipe.model.init is None:  # no checkpoint has a say in the shape
        check_layout(student_shape(recipe, None), recipe.parallel, "model")
    num_microbatches(recipe, ranks)


def check_recipe(recipe: Recipe, ranks: int | None = None) -> str:
    """A short description of the run. Raises UserError for the first thing that is wrong.

    ranks: how many it is to start on. None: the fewest that the layout takes.
    """
    RunFolder(Path(recipe.run), recipe).check()
    check_optional_parts(recipe)
    if recipe.reference and recipe.reference.write_scores:
        check_place(Path(recipe.reference.write_scores), "reference.write_scores")
    if recipe.reference and recipe.reference.queue and recipe.reference.queue.folder:
        check_place(recipe.queue_folder, "reference.queue.folder")
    device, p = resolve_device(recipe.compute.device), recipe.parallel
    plan = make_build_plan(recipe, device)
    ranks = ranks or p.tensor * p.pipeline * p.context
    microbatches = check_fit(recipe, plan.shape, plan.reference_shape, device_type=device, num_ranks=ranks)
    lines = [f"{recipe.run}: {recipe.train_steps} steps of {recipe.batch.global_batch_tokens:,} tokens"]
    lines.append(f"layout     {ranks} ranks, {microbatches} microbatches a step")
    lines.append(f"model      {plan.shape.num_parameters() / 1e6:,.1f}M parameters, {plan.precision}")
    if plan.reference_shape:
        lines.append(
            f"reference  {plan.reference_shape.num_parameters() / 1e6:,.1f}M parameters, {plan.reference_path}"
        )
        if plan.note:
            lines.append(f"           {plan.note}")
    made_with, infos = recipe_tokenizer(recipe), []
    for source in recipe.data.train:
        infos.append(quick_verify(source.path, vocab_size=plan.common_rows, tokenizer_hash=made_with))
        lines.append(f"data       {source.path}: {infos[-1].num_tokens:,} tokens, weight {source.weight:g}")
    made_with = check_tokenizers(recipe, plan, infos)
    check_documents(recipe, end_of_document(infos, recipe.data.eod_id), plan.shape.vocab_size)
    held_out = {}
    for name, path in recipe.data.eval.items():
        held_out[name] = quick_verify(path, vocab_size=plan.common_rows, tokenizer_hash=made_with)
        lines.append(f"held out   {name}: {path}: {held_out[name].num_tokens:,} tokens")
    check_sources(infos, held_out, recipe.data.eod_id)
    return "\n".join(lines)
