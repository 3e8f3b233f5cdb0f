"""What a stage's rows become before an engine is given them, with every row checked first."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.posttrain import data, verifiers
from remit_megatron.posttrain.contract import StageSpec
from remit_megatron.posttrain.tokens import ChatTokenizer, prompt_ids

TRIED = ("no idea", "yes", "Well, it is 7.")
"""Answers that are not all right for anything."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Of `sft`: token ids and labels a row. Of `dpo` and `rl`: rows as an engine takes them."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    rows: list[dict[str, Any]]


class _Limit:
    """The longest row, and what is done with a longer one."""

    def __init__(self, too_long: str, tokens: int, key: str):
        self.drops, self.tokens, self.key, self.dropped = too_long == "drop", tokens, key, 0

    def keeps(self, where: str, what: str, tokens: int) -> bool:
        """Raises UserError for a row that is too long, unless such rows are to be dropped."""
        if tokens <= self.tokens:
            return True
        if not self.drops:
            kind = self.key.partition(".")[0]
            raise UserError(
                f"{where}: {what} is {tokens} tokens long, and {self.key} = {self.tokens} would cut it: raise it, or "
                f"set {kind}.too_long to 'drop'"
            )
        self.dropped += 1
        return False

    def say(self) -> None:
        if self.dropped:
            print(f"remit: {self.dropped} rows longer than {self.key} are dropped", file=sys.stderr, flush=True)


def prepare(spec: StageSpec, given: Path) -> Prepared:
    """Read and check all rows. given: the stage's input, whose tokenizer files words them.

    Raises UserError naming the first row that does not fit.
    """
    prepared = {"sft": _sft, "dpo": _dpo, "rl": _rl}[spec.kind](spec, given)
    count = len(prepared.ids) or len(prepared.rows)
    each = spec.settings.batch_samples // (spec.rl.completions if spec.rl else 1)
    if count < each:
        raise UserError(f"data: {count} rows, and a step takes {each}: give more, or a smaller batch_samples")
    return prepared


def _rows(spec: StageSpec) -> Iterator[tuple[str, data.Row]]:
    for file in spec.data:
        yield from data.read_rows(file.path)


def _sft(spec: StageSpec, given: Path) -> Prepared:
    assert spec.sft is not None
    limit = _Limit(spec.sft.too_long, spec.sft.max_tokens, "sft.max_tokens")
    chat = ChatTokenizer(given)
    prepared = Prepared([], [], [])
    for where, row in _rows(spec):
        ids, labels = chat.conversation(where, data.conversation(where, row))
        if not limit.keeps(where, "the conversation", len(ids)):
            continue
        prepared.ids.append(ids)
        prepared.labels.append(labels)
    limit.say()
    return prepared


def _dpo(spec: StageSpec, given: Path) -> Prepared:
    assert spec.dpo is not None
    limit = _Limit(spec.dpo.too_long, spec.dpo.max_tokens, "dpo.max_tokens")
    chat: ChatTokenizer | None = None
    prepared = Prepared([], [], [])
    kinds = set()
    for where, row in _rows(spec):
        pair = data.preference(where, row)
        plain = isinstance(pair["prompt"], str)
        kinds.add(plain)
        if len(kinds) > 1:
            raise UserError(f"{where}: the rows before are {'messages' if plain else 'text'}: give all rows one form")
        chat = chat or ChatTokenizer(given, needs_template=not plain)
        for name in ("chosen", "rejected"):
            ids = chat.ids(pair["prompt"] + pair[name] + chat.end, special=True) if plain else chat.ids(
                chat.text(pair["prompt"] + pair[name])
            )  # fmt: skip
            if not limit.keeps(where, f"prompt and {name} answer", len(ids)):
                break
        else:
            prepared.rows.append(pair)
    limit.say()
    return prepared


def _rl(spec: StageSpec, given: Path) -> Prepared:
    assert spec.rl is not None
    limit = _Limit(spec.rl.too_long, spec.rl.max_prompt_tokens, "rl.max_prompt_tokens")
    chat: ChatTokenizer | None = None
    prepared = Prepared([], [], [])
    kinds, tells_apart, first = set(), False, ""
    for where, row in _rows(spec):
        problem = data.problem(where, row, spec.rl.verifier)
        verifier = verifiers.find(problem.verifier, where, allow_code=spec.allow_code_execution)
        wrong = verifier.problem(problem.ground_truth)
        if wrong:
            raise UserError(
                f"{where}: verifier '{verifier.name}' does not know the ground truth "
                f"{str(problem.ground_truth)[:60]!r}: {wrong}"
            )
        tells_apart = _tells_apart(where, verifier, problem.ground_truth) or tells_apart
        first = first or where
        plain = isinstance(problem.prompt, str)
        kinds.add(plain)
        if len(kinds) > 1:
            raise UserError(f"{where}: the rows before are {'messages' if plain else 'text'}: give all rows one form")
        chat = chat or ChatTokenizer(given, needs_template=not plain)
        if not limit.keeps(where, "the prompt", len(prompt_ids(chat, problem.prompt))):
            continue
        prepared.rows.append(
            {"prompt": problem.prompt, "verifier": verifier.name, "ground_truth": json.dumps(problem.ground_truth)}
        )
    limit.say()
    if not tells_apart:
        raise UserError(f"{first} and all others: the reward is constant: any answer earns it")
    return prepared


def _tells_apart(where: str, verifier: verifiers.Verifier, truth: Any) -> bool:
    """Whether some answer earns less than the right one. Raises UserError where the right one is refused."""
    right = verifier.right_answer(truth)
    best = 1.0 if right is None else verifier.score(right, truth)
    if best < 1.0:
        raise UserError(f"{where}: verifier '{verifier.name}' refuses its own right answer, {right!r}")
    return any(verifier.score(text, truth) < best for text in TRIED)
