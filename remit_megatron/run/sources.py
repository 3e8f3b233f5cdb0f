"""The training datasets of a recipe, opened and matched with its models."""

from remit_megatron.config import Recipe
from remit_megatron.mcore.datasets import TrainingData, open_source
from remit_megatron.run.build_plan import BuildPlan
from remit_megatron.run.fit import check_tokenizers, recipe_tokenizer


def open_training(recipe: Recipe, plan: BuildPlan) -> tuple[TrainingData, str | None]:
    """(every sample of the run by number, hash of the tokenizer that made them). Collective where ranks have joined.

    Raises UserError for a dataset that does not fit, and for datasets or models of different tokenizers.
    """
    made_with = recipe_tokenizer(recipe)
    sources = [open_source(source.path, recipe.data, plan.common_rows, made_with) for source in recipe.data.train]
    tokenizer = check_tokenizers(recipe, plan, [source.info for source in sources])
    return TrainingData(sources, recipe.data, recipe.train_steps * recipe.global_batch_samples), tokenizer
