"""Verifiers that compare text: all of it, its last number, its chosen letter."""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from remit_megatron.posttrain.verifiers.base import Verifier

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'])")
ANSWER = re.compile(r"(?i:answer)\s*(?:(?i:is)|:|=)?\s*:?\s*\(?([A-J])\)?(?![A-Za-z'])")


class ExactMatch(Verifier):
    """The whole answer, but for white space at its ends."""

    name = "exact_match"

    def problem(self, truth: Any) -> str | None:
        return None if isinstance(truth, str | int) and str(truth).strip() else "a text is expected"

    def right_answer(self, truth: Any) -> str:
        return str(truth)

    def score(self, text: str, truth: Any) -> float:
        return float(text.strip() == str(truth).strip())


class FinalNumber(Verifier):
    """The last number of the answer, as GSM8K is scored: commas dropped, 18.0 equal to 18."""

    name = "gsm8k"

    def problem(self, truth: Any) -> str | None:
        return None if _number(_gold(truth)) is not None else "a number is expected, alone or after ####"

    def right_answer(self, truth: Any) -> str:
        return f"The answer is {_gold(truth)}."

    def score(self, text: str, truth: Any) -> float:
        found = NUMBER.findall(text)
        return float(bool(found) and _number(found[-1]) == _number(_gold(truth)))


def _gold(truth: Any) -> str:
    """GSM8K's own solutions end with `#### 18`."""
    return str(truth).rpartition("####")[2].strip() if isinstance(truth, str | int | float) else ""


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


class MultipleChoice(Verifier):
    """The letter after the last "answer", else the last letter that stands alone."""

    name = "multiple_choice"

    def problem(self, truth: Any) -> str | None:
        return None if isinstance(truth, str) and re.fullmatch(r"[A-J]", truth) else "a letter from A to J is expected"

    def right_answer(self, truth: Any) -> str:
        return f"The answer is ({truth})."

    def score(self, text: str, truth: Any) -> float:
        found = ANSWER.findall(text) or LETTER.findall(text)
        return float(bool(found) and found[-1] == truth)


EXACT, FINAL_NUMBER, MULTIPLE_CHOICE = ExactMatch(), FinalNumber(), MultipleChoice()
