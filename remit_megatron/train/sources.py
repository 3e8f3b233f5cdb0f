"""The training datasets of a recipe, opened and matched with its models."""

from typing import Any

from remit_megatron.config import Recipe
from remit_megatron.mcore import datasets
from remit_megatron.train.fit import check_tokenizers, recipe_tokenizer
from remit_megatron.train.models import Plan


def open_sources(recipe: Recipe, plan: Plan) -> tuple[list[Any], str | None]:
    """(sources, hash of the tokenizer that made them). Collective.

    Raises UserError for a dataset that does not fit, and for datasets or models of different tokenizers.
    """
    made_with = recipe_tokenizer(recipe)
    sources = [
        datasets.open_source(source.path, recipe.data, plan.common_rows, made_with) for source in recipe.data.train
    ]
    return sources, check_tokenizers(recipe, plan, [source.info for source in sources])
