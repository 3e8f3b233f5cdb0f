"""Whether a frozen reference can score a student's tokens: one tokenizer, and enough rows."""

from remit_megatron.data.tokenizer import differ_in_added_tokens_only, same_tokenizer
from remit_megatron.errors import UserError

HOW = "`remit convert check MODEL REFERENCE` shows where"


def common_rows(
    rows: tuple[int, int],
    tokenizers: tuple[str | None, str | None],
    *,
    needs_distribution: bool,
    allow_added_tokens: bool = False,
) -> tuple[int, str | None]:
    """(ids that both models have a row for, what to say of it or None), of a student and its reference in this order.

    rows: of their embeddings. tokenizers: identities as `data.tokenizer.identity` gives them; None where unknown.
    needs_distribution: whether the objective compares the two softmaxes; otherwise only the label's loss is read, and
    the rows past the tokenizer's ids, which are padding, are each model's own matter. Every dataset has to stay below
    the number returned. Raises UserError where the tokenizers differ, or where rows differ and nothing shows that one
    tokenizer made both.
    """
    ours, theirs = tokenizers
    if ours and theirs and not same_tokenizer(ours, theirs):
        if not differ_in_added_tokens_only(ours, theirs):
            raise UserError(f"reference.path: its tokenizer is not that of model.init: {HOW}")
        if not allow_added_tokens:
            raise UserError(
                f"reference.path: its tokenizer has other added tokens than that of model.init: {HOW}; where no text "
                "spells them, set reference.allow_added_tokens = true"
            )
    if rows[0] == rows[1]:
        return rows[0], None
    said = f"its vocabulary has {rows[1]} rows, the model's {rows[0]}"
    if not (ours and theirs):
        raise UserError(f"reference.path: {said}, and nothing shows that one tokenizer made both")
    common = min(rows)
    if needs_distribution:
        return common, f"reference.path: {said}: of one tokenizer; distributions are compared over {common} common rows"
    return common, f"reference.path: {said}: of one tokenizer, the rows past its ids are padding"
