"""A recipe and the checkpoints and datasets it names, checked without starting ranks or allocating a model."""

from remit_megatron.config import Recipe
from remit_megatron.data.manifest import quick_verify
from remit_megatron.mcore.platform import resolve_device
from remit_megatron.train.models import make_plan


def check_recipe(recipe: Recipe) -> str:
    """A short description of the run. Raises UserError for the first thing that is wrong."""
    plan = make_plan(recipe, resolve_device(recipe.compute.device))
    lines = [f"{recipe.run}: {recipe.train_steps} steps of {recipe.batch.global_batch_tokens:,} tokens"]
    lines.append(f"model      {plan.shape.num_parameters() / 1e6:,.1f}M parameters, {plan.dtype}")
    if plan.reference_shape:
        lines.append(
            f"reference  {plan.reference_shape.num_parameters() / 1e6:,.1f}M parameters, {plan.reference_path}"
        )
    for source in recipe.data.train:
        info = quick_verify(source.path, vocab_size=plan.shape.vocab_size)
        lines.append(f"data       {source.path}: {info.num_tokens:,} tokens, weight {source.weight:g}")
    for name, path in recipe.data.eval.items():
        info = quick_verify(path, vocab_size=plan.shape.vocab_size)
        lines.append(f"held out   {name}: {path}: {info.num_tokens:,} tokens")
    return "\n".join(lines)
