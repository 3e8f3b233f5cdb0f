"""What a stage's rows become before an engine is given them, with every row checked first."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.posttrain import data, verifiers
from remit_megatron.posttrain.contract import StageSpec
from remit_megatron.posttrain.tokens import ChatTokenizer, check_length, prompt_ids

WRONG_ANSWERS = ("", "no idea")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Of `sft`: token ids and labels a row. Of `dpo` and `rl`: rows as an engine takes them."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    rows: list[dict[str, Any]]


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
    chat = ChatTokenizer(given)
    prepared = Prepared([], [], [])
    for where, row in _rows(spec):
        ids, labels = chat.conversation(where, data.conversation(where, row))
        check_length(where, "the conversation", len(ids), spec.sft.max_tokens, "sft.max_tokens")
        prepared.ids.append(ids)
        prepared.labels.append(labels)
    return prepared


def _dpo(spec: StageSpec, given: Path) -> Prepared:
    assert spec.dpo is not None
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
            check_length(where, f"prompt and {name} answer", len(ids), spec.dpo.max_tokens, "dpo.max_tokens")
        prepared.rows.append(pair)
    return prepared


def _rl(spec: StageSpec, given: Path) -> Prepared:
    assert spec.rl is not None
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
        length = len(prompt_ids(chat, problem.prompt))
        check_length(where, "the prompt", length, spec.rl.max_prompt_tokens, "rl.max_prompt_tokens")
        prepared.rows.append(
            {"prompt": problem.prompt, "verifier": verifier.name, "ground_truth": json.dumps(problem.ground_truth)}
        )
    if not tells_apart:
        raise UserError(f"{first} and all others: the reward is constant: right and wrong answers earn the same")
    return prepared


def _tells_apart(where: str, verifier: verifiers.Verifier, truth: Any) -> bool:
    """Whether some wrong answer earns less than the right one. Raises UserError where the right one is refused."""
    right = verifier.right_answer(truth)
    best = 1.0 if right is None else verifier.score(right, truth)
    if best < 1.0:
        raise UserError(f"{where}: verifier '{verifier.name}' refuses its own right answer, {right!r}")
    return any(verifier.score(text, truth) < best for text in WRONG_ANSWERS)
