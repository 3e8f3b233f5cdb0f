"""Answers of BBH read a second time, from the samples that lm_eval keeps.

lm_eval's own pattern wants the words "the answer is" and drops the last character after them; models that were trained
with verified rewards put their answers into \\boxed{} and score 0 by it. Here a final answer in a box counts too.
"""

import json
import math
import re
from pathlib import Path

from remit_megatron.errors import RunError

SAID = re.compile(r"the answer is\s*:?", re.IGNORECASE)
BOX = "\\boxed{"
WRAPPED = re.compile(r"^\\(?:text|textbf|mathrm|mathbf)\{(.*)\}$", re.DOTALL)
OPTION = re.compile(r"^\(([A-Z])\)$")


def final_answer(text: str) -> str | None:
    """What the last box holds, else what follows the last "the answer is" on its line; None where there is neither."""
    start = text.rfind(BOX)
    if start >= 0:
        return _plain(_balanced(text[start + len(BOX) :]))
    said = list(SAID.finditer(text))
    return _plain(text[said[-1].end() :].strip().split("\n")[0]) if said else None


def _balanced(text: str) -> str:
    """Up to the brace that closes what was opened before; all where none does."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:place]
    return text


def _plain(answer: str) -> str:
    answer = answer.strip().strip("$").strip()
    while wrapped := WRAPPED.match(answer):
        answer = wrapped[1].strip()
    return answer.rstrip(".").strip()


def is_right(text: str, target: str) -> bool:
    """Whether an answer's text ends in the target. An option counts with and without its parentheses."""
    answer, wanted = final_answer(text), target.strip()
    option = OPTION.match(wanted)
    return answer == wanted or (option is not None and answer == option[1])


def share_right(output: Path, tasks: list[str]) -> tuple[float, float]:
    """(share of all items answered rightly, its standard error), over the samples of tasks below `output`.

    Raises RunError where a task left none.
    """
    right = []
    for name in tasks:
        paths = sorted(output.rglob(f"samples_{name}_*.jsonl"))
        if not paths:
            raise RunError(f"lm_eval left no samples of {name} in {output}")
        for line in (line for path in paths for line in path.read_text(encoding="utf-8").splitlines()):
            sample = json.loads(line)
            right.append(is_right(sample["resps"][0][0], str(sample["target"])))
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1.0 - share) / max(1, len(right) - 1))
