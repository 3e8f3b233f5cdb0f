"""What of a recipe and its models must fit the datasets, before anything is built; layouts: remit_megatron/fit.py."""

from collections.abc import Sequence

from remit_megatron.config import Recipe
from remit_megatron.data.manifest import DatasetInfo
from remit_megatron.data.tokenizer import differ_in_added_tokens_only, same_tokenizer, tokenizer_hash
from remit_megatron.errors import UserError
from remit_megatron.objectives.needs import Need
from remit_megatron.objectives.settings import RemitSettings
from remit_megatron.run.build_plan import BuildPlan


def recipe_tokenizer(recipe: Recipe) -> str | None:
    """Hash of data.tokenizer, which every dataset is to match; None where the recipe names none."""
    return tokenizer_hash(recipe.data.tokenizer) if recipe.data.tokenizer else None


def check_tokenizers(recipe: Recipe, plan: BuildPlan, infos: Sequence[DatasetInfo]) -> str | None:
    """Hash of the tokenizer that made the training datasets; None where neither they nor the recipe name one.

    Raises UserError for datasets, or a model, of different tokenizers.
    """
    hashes = {info.prefix: info.tokenizer_hash for info in infos if info.tokenizer_hash}
    # The datasets' own first, so that a run goes on under the name by which it knew its tokenizer.
    found = next(iter(hashes.values()), None) or recipe_tokenizer(recipe)
    if found is None:
        return None
    if not all(same_tokenizer(found, other) for other in hashes.values()):
        raise UserError(f"data.train: the datasets were made with different tokenizers: {', '.join(map(str, hashes))}")
    own = f"checkpoint {plan.resume}" if plan.resume else "model.init"
    for key, meta in ((own, plan.init_meta), ("reference.path", plan.reference_meta)):
        if meta and meta.tokenizer and not same_tokenizer(meta.tokenizer, found):
            raise UserError(f"{key}: it was trained with another tokenizer than that of data.train")
        converted = meta.origin.get("tokenizer") if meta and meta.origin else None
        # A model may know more added tokens than its data were made with: no id of theirs is in the data.
        if converted and not same_tokenizer(converted, found) and not differ_in_added_tokens_only(converted, found):
            raise UserError(f"{key}: its tokenizer is not the one that data.train was made with")
    return found


def check_documents(recipe: Recipe, eod_id: int | None, vocab_size: int) -> None:
    """Raises UserError where a setting needs to know where documents end, and nothing tells."""
    objective = recipe.objective
    by_document = (
        "objective.centering = 'document'"
        if isinstance(objective, RemitSettings)
        else f"objective.name = '{objective.name}'"
    )
    needing = {
        by_document: Need.DOCUMENTS in objective.needs,
        "data.document_mask": recipe.data.document_mask,
        "data.eod_mask_loss": recipe.data.eod_mask_loss,
    }
    for setting, is_set in needing.items():
        if is_set and eod_id is None:
            raise UserError(f"{setting} needs data.eod_id: the datasets' manifests name none")
    if eod_id is not None and eod_id >= vocab_size:
        raise UserError(f"data.eod_id = {eod_id} is not in the vocabulary of {vocab_size} rows")
