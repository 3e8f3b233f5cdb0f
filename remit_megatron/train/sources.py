"""The training datasets of a recipe, opened and matched with its models."""

from typing import Any

from remit_megatron.config import Recipe
from remit_megatron.data.manifest import tokenizer_hash
from remit_megatron.errors import UserError
from remit_megatron.mcore import datasets
from remit_megatron.train.models import Plan


def open_sources(recipe: Recipe, plan: Plan) -> tuple[list[Any], str | None]:
    """(sources, hash of the tokenizer that made them). Collective.

    Raises UserError for a dataset that does not fit, and for datasets or models of different tokenizers.
    """
    made_with = tokenizer_hash(recipe.data.tokenizer) if recipe.data.tokenizer else None
    sources = [
        datasets.open_source(source.path, recipe.data, plan.shape.vocab_size, made_with) for source in recipe.data.train
    ]
    hashes = {s.info.prefix: s.info.tokenizer_hash for s in sources if s.info.tokenizer_hash}
    if len(set(hashes.values())) > 1:
        raise UserError(f"data.train: the datasets were made with different tokenizers: {', '.join(map(str, hashes))}")
    found = made_with or next(iter(hashes.values()), None)
    for key, meta in (("model.init", plan.init_meta), ("reference.path", plan.reference_meta)):
        if meta and meta.tokenizer and found and meta.tokenizer != found:
            raise UserError(f"{key}: it was trained with another tokenizer than that of data.train")
    return sources, found
