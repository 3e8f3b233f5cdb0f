"""reasoning-gym: its tasks as data, and its scorers."""

import json
import random
from pathlib import Path
from typing import Any

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError
from remit_megatron.posttrain.verifiers.base import Verifier

ASK = "Give only the answer."


class ReasoningGym(Verifier):
    """1 where the task's own scorer gives all of its points, else 0.

    Scorers give parts of a point to wrong answers (a digit before a right product earns 0.9), and some raise on free
    text, which counts as wrong. Blanks at the ends do not count.
    """

    name = "reasoning_gym"

    def load(self) -> None:
        _package()

    def problem(self, truth: Any) -> str | None:
        entry = _entry(truth)
        if entry is None:
            return "an object with `task` and `entry` is expected, as `remit post data` writes it"
        if entry["task"] not in _package().factory.DATASETS:
            return f"reasoning-gym has no task '{entry['task']}'"
        return None

    def right_answer(self, truth: Any) -> str | None:
        entry = _entry(truth)
        answer = entry["entry"].get("answer") if entry else None
        return answer if isinstance(answer, str) else None  # some tasks accept many answers and name none

    def score(self, text: str, truth: Any) -> float:
        entry = _entry(truth)
        assert entry is not None
        scorer = _package().get_score_answer_fn(entry["task"])
        try:
            return float(scorer(text.strip(), entry["entry"]) >= 1.0)
        except Exception:  # noqa: BLE001 - 106 scorers by as many hands, given whatever a model writes
            return 0.0


def _entry(truth: Any) -> dict[str, Any] | None:
    try:
        entry = json.loads(truth) if isinstance(truth, str) else truth
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("entry"), dict) and "task" in entry else None


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError:
        raise UserError("verifier 'reasoning_gym' needs reasoning-gym: pip install 'remit-megatron[post]'") from None
    return reasoning_gym


def make_data(task: str, folder: Path, train: int, test: int, seed: int, settings: dict[str, Any]) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl of a task for `rl`; no question is in both, and none twice.

    Two seeds of a small task share most of their questions, so both files are cut from one list. Raises UserError for
    a task with fewer different questions than are asked for.
    """
    package = _package()
    if task not in package.factory.DATASETS:
        raise UserError(f"reasoning-gym has no task '{task}'; it has {', '.join(sorted(package.factory.DATASETS))}")
    found: dict[str, str] = {}
    try:
        dataset = package.create_dataset(task, size=4 * (train + test), seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"reasoning-gym's {task}: {error}") from None
    for entry in dataset:
        if entry["question"] not in found and len(found) < train + test:
            truth = {"task": task, "entry": json.loads(json.dumps(entry, default=str))}
            row = {
                "prompt": [{"role": "user", "content": f"{entry['question']}\n{ASK}"}],
                "ground_truth": json.dumps(truth),
                "verifier": "reasoning_gym",
            }
            found[entry["question"]] = json.dumps(row) + "\n"
    if len(found) < train + test:
        raise UserError(
            f"reasoning-gym's {task}: {len(found)} different questions in {4 * (train + test)}, and {train + test} are "
            "asked for: ask for fewer, or make the task larger with --with"
        )
    lines = list(found.values())
    random.Random(seed).shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (lines[:train], lines[train:]), strict=True):
        write_atomically(path, "".join(part).encode())
    return paths


REASONING_GYM = ReasoningGym()
