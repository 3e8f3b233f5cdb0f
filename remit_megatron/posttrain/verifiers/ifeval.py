"""IFEval's instructions, checked by lm-eval's own code."""

import json
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.posttrain.verifiers.base import Verifier

SPLIT_BY_NLTK = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
"""Instructions whose checks need nltk's data."""


class IFEval(Verifier):
    """The share of the instructions that the answer follows, strictly: not tried again without its first line.

    The truth is an object with `instruction_id_list` and `kwargs`, as google/IFEval has them; or open-instruct's form
    of it, a list with one object of `instruction_id` and `kwargs`.
    """

    name = "ifeval"

    def load(self) -> None:
        _registry()

    def problem(self, truth: Any) -> str | None:
        instructions = _instructions(truth)
        if not instructions:
            return "an object with `instruction_id_list` and `kwargs` is expected"
        known = _registry()
        for name, arguments in instructions:
            if name not in known:
                return f"instruction '{name}' is unknown"
            if name in SPLIT_BY_NLTK and not _nltk_data():
                return f"instruction '{name}' needs nltk's data: python -m nltk.downloader punkt_tab"
            try:
                known[name](name).build_description(**arguments)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                return f"instruction '{name}' does not take {arguments}: {error}"
        return None

    def right_answer(self, truth: Any) -> str | None:
        return None

    def score(self, text: str, truth: Any) -> float:
        if not text.strip():
            return 0.0
        known, instructions = _registry(), _instructions(truth)
        followed = 0
        for name, arguments in instructions:
            checker = known[name](name)
            checker.build_description(**arguments)
            try:
                followed += bool(checker.check_following(text))
            except Exception:  # noqa: BLE001 - langdetect and nltk, given whatever a model writes
                continue
        return followed / len(instructions)


def _instructions(truth: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each; empty for anything else."""
    try:
        content = json.loads(truth) if isinstance(truth, str) else truth
    except ValueError:
        return []
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, dict):
        return []
    names, arguments = content.get("instruction_id_list") or content.get("instruction_id"), content.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
        return []
    # Tables fill the arguments that an instruction does not have with null.
    return [
        (name, {k: v for k, v in (given or {}).items() if v is not None})
        for name, given in zip(names, arguments, strict=True)
    ]


def _nltk_data() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _registry() -> dict[str, Any]:
    try:
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError:
        raise UserError("verifier 'ifeval' needs lm-eval: pip install 'remit-megatron[post,eval]'") from None
    return dict(instructions_registry.INSTRUCTION_DICT)


IFEVAL = IFEval()
