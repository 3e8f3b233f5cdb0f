"""math-verify: equal as mathematics."""

import logging
import re
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.posttrain.verifiers.base import Verifier

TIMEOUT_S = 5
CLOCK = re.compile(r"\d{1,2}:\d{2}")


class Math(Verifier):
    """The boxed answer, else the last expression, equal to the truth as math-verify's own defaults have it.

    Its parser reads 12:45 as a ratio and "- 5" as 5: times are compared as text, and the space after a sign is
    dropped.
    """

    name = "math"

    def load(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise UserError("verifier 'math' needs math-verify: pip install 'remit-megatron[post]'") from None
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each answer that is no mathematics, with a traceback

    def problem(self, truth: Any) -> str | None:
        if not isinstance(truth, str | int | float) or not str(truth).strip():
            return "a number or an expression is expected"
        if not CLOCK.fullmatch(str(truth).strip()) and not _parse_gold(str(truth)):
            return "math-verify reads no mathematics in it"
        return None

    def right_answer(self, truth: Any) -> str:
        return f"\\boxed{{{_bare(str(truth))}}}"

    def score(self, text: str, truth: Any) -> float:
        gold = _bare(str(truth))
        if CLOCK.fullmatch(gold):
            found = CLOCK.findall(text)
            return float(bool(found) and found[-1] == gold)
        from math_verify import verify

        return float(bool(verify(_parse_gold(gold), _parse(text), timeout_seconds=TIMEOUT_S)))


def _bare(truth: str) -> str:
    """The content of one box around all of it, or of one pair of dollar signs."""
    truth = truth.strip()
    boxed = re.fullmatch(r"\\boxed\{(.*)\}", truth, re.DOTALL) or re.fullmatch(r"\$+(.*?)\$+", truth, re.DOTALL)
    return boxed[1].strip() if boxed else truth


def _parse_gold(truth: str) -> list[Any]:
    return _parse(f"\\boxed{{{_bare(truth)}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(re.sub(r"(?<![\w)}\]])([-+]) +(?=\d)", r"\1", text), parsing_timeout=TIMEOUT_S))


MATH = Math()
