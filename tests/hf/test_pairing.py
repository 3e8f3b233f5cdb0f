"""Tokenizers first, then rows: what a student and its reference have in common."""

import pytest

from remit_megatron.errors import UserError
from remit_megatron.hf.pairing import common_rows

ONE = f"{'1' * 32}-{'a' * 16}-{'2' * 16}-{'3' * 12}"
SAVED_AGAIN = f"{'1' * 32}-{'a' * 16}-{'4' * 16}-{'5' * 12}"
MORE_TOKENS = f"{'1' * 32}-{'b' * 16}-{'6' * 16}-{'7' * 12}"
OTHER = f"{'8' * 32}-{'a' * 16}-{'9' * 16}-{'0' * 12}"
OLD = "2" * 64


@pytest.mark.parametrize("tokenizers", [(ONE, SAVED_AGAIN), (ONE, OLD), (OLD, ONE), ("3" * 12, ONE), (None, ONE)])
def test_one_tokenizer_and_equal_rows(tokenizers: tuple[str | None, str | None]) -> None:
    assert common_rows((100, 100), tokenizers, needs_distribution=True) == (100, None)


def test_padding_rows_of_one_tokenizer() -> None:
    rows, said = common_rows((151936, 152064), (ONE, SAVED_AGAIN), needs_distribution=False)
    assert rows == 151936
    assert said == (
        "reference.path: its vocabulary has 152064 rows, the model's 151936: of one tokenizer, the rows past its ids "
        "are padding"
    )
    rows, said = common_rows((152064, 151936), (ONE, SAVED_AGAIN), needs_distribution=True)
    assert rows == 151936
    assert "compared over 151936 common rows" in (said or "")


def test_refusals_name_the_reason() -> None:
    with pytest.raises(UserError, match=r"^reference\.path: its tokenizer is not that of model\.init"):
        common_rows((100, 90), (ONE, OTHER), needs_distribution=False)
    with pytest.raises(UserError, match=r"set reference\.allow_added_tokens = true"):
        common_rows((100, 100), (ONE, MORE_TOKENS), needs_distribution=False)
    with pytest.raises(UserError, match="nothing shows that one tokenizer made both"):
        common_rows((100, 90), (None, ONE), needs_distribution=False)


def test_added_tokens_that_the_user_allows() -> None:
    tokenizers = (ONE, MORE_TOKENS)
    assert common_rows((90, 90), tokenizers, needs_distribution=False, allow_added_tokens=True) == (90, None)
    with pytest.raises(UserError, match="its tokenizer is not that"):
        common_rows((90, 90), (ONE, OTHER), needs_distribution=False, allow_added_tokens=True)
