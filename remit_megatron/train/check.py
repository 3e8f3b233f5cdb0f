"""A recipe and the checkpoints and datasets it names, checked without starting ranks or allocating a model."""

from pathlib import Path

from remit_megatron.config import Recipe
from remit_megatron.data.files import check_place
from remit_megatron.data.loader import check_loader
from remit_megatron.data.manifest import quick_verify
from remit_megatron.mcore.datasets import end_of_document
from remit_megatron.mcore.model import check_implementation
from remit_megatron.mcore.platform import resolve_device
from remit_megatron.train.fit import (
    check_documents,
    check_tokenizers,
    num_microbatches,
    recipe_tokenizer,
)
from remit_megatron.train.folder import RunFolder
from remit_megatron.train.loggers import check_loggers
from remit_megatron.train.models import make_plan


def check_recipe(recipe: Recipe, ranks: int | None = None) -> str:
    """A short description of the run. Raises UserError for the first thing that is wrong.

    ranks: how many it is to start on. None: the fewest that the layout takes.
    """
    RunFolder(Path(recipe.run), recipe).check()
    check_loggers(recipe)
    check_loader(recipe.data.loader)
    check_implementation(recipe.model.implementation)
    if recipe.reference and recipe.reference.write_scores:
        check_place(Path(recipe.reference.write_scores), "reference.write_scores")
    if recipe.reference and recipe.reference.queue and recipe.reference.queue.folder:
        check_place(recipe.queue_folder, "reference.queue.folder")
    plan = make_plan(recipe, resolve_device(recipe.compute.device))
    p = recipe.parallel
    ranks = ranks or p.tensor * p.pipeline * p.context
    microbatches = num_microbatches(recipe, ranks)
    lines = [f"{recipe.run}: {recipe.train_steps} steps of {recipe.batch.global_batch_tokens:,} tokens"]
    lines.append(f"layout     {ranks} ranks, {microbatches} microbatches a step")
    lines.append(f"model      {plan.shape.num_parameters() / 1e6:,.1f}M parameters, {plan.dtype}")
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
    check_documents(recipe, end_of_document(infos, recipe.data), plan.shape.vocab_size)
    for name, path in recipe.data.eval.items():
        info = quick_verify(path, vocab_size=plan.common_rows, tokenizer_hash=made_with)
        lines.append(f"held out   {name}: {path}: {info.num_tokens:,} tokens")
    return "\n".join(lines)
