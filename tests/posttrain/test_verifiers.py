"""What each verifier takes as right, the surprises of their packages included."""

import json
from pathlib import Path

import pytest

from remit_megatron.errors import UserError
from remit_megatron.posttrain.verifiers import VERIFIERS, find
from remit_megatron.posttrain.verifiers.reasoning import make_data

CASES = [
    ("exact_match", "yes", {" yes\n": 1, "Yes": 0, "yes.": 0}),
    ("gsm8k", "18", {"18": 1, "He has 3, so $18.00.": 1, "18 apples and 2 pears": 0, "eighteen": 0, "": 0}),
    ("gsm8k", "3 + 4 = 7\n#### 1,234", {"It is 1234.": 1, "7": 0}),
    ("gsm8k", "-5", {"-5": 1, "5": 0, "10 -5": 1}),
    (
        "multiple_choice",
        "B",
        {"B": 1, "(B)": 1, "The answer is (B).": 1, "A or C. Answer: B, not A": 1, "A": 0, "Bob": 0},
    ),
    ("math", "72", {"The answer is 72.": 1, "\\boxed{72}": 1, "72 or 73": 0, "": 0}),
    ("math", "\\frac{1}{2}", {"\\boxed{0.5}": 1, "$\\frac{2}{4}$": 1, "\\boxed{2}": 0}),
    ("math", "$x+1$", {"\\boxed{1+x}": 1, "\\boxed{x}": 0}),
    ("math", "12:45", {"at 12:45": 1, "12:30": 0}),
    ("math", "-5", {"- 5": 1, "-5": 1, "5": 0}),
]


@pytest.mark.parametrize(("name", "truth", "answers"), CASES)
def test_scores(name: str, truth: str, answers: dict[str, int]) -> None:
    verifier = find(name, "row 1", allow_code=False)
    assert verifier.problem(truth) is None
    assert {text: verifier.score(text, truth) for text in answers} == answers
    right = verifier.right_answer(truth)
    assert right is not None
    assert verifier.score(right, truth) == 1


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("gsm8k", "many"),
        ("gsm8k", None),
        ("multiple_choice", "Z"),
        ("math", ""),
        ("exact_match", " "),
        ("ifeval", "{}"),
        ("reasoning_gym", json.dumps({"task": "none", "entry": {}})),
        ("reasoning_gym", "7"),
        ("python", "assert 1"),
    ],
)
def test_unknown_truth(name: str, truth: object) -> None:
    assert VERIFIERS[name].problem(truth)


def test_names() -> None:
    assert find("MATH", "row 1", allow_code=False) is VERIFIERS["math"]
    with pytest.raises(UserError, match=r"row 3: verifier 'gsm9k' is unknown; known: exact_match, gsm8k"):
        find("gsm9k", "row 3", allow_code=False)
    with pytest.raises(UserError, match=r"row 3: verifier 'python' runs code .* --allow-code-execution"):
        find("python", "row 3", allow_code=False)


def test_python() -> None:
    verifier, tests = find("python", "row 1", allow_code=True), ["assert f(2) == 4", "assert f(3) == 9"]
    assert verifier.problem(tests) is None
    right = "Here:\n```python\ndef f(x):\n    return x * x\n```\nDone."
    assert verifier.score(right, tests) == 1
    assert verifier.score("def f(x):\n    return x + 2", tests) == 0
    assert verifier.score("import sys; sys.exit(0)", tests) == 0, "an early end passes nothing"
    assert verifier.score("def f(x): \0", tests) == 0


def test_ifeval() -> None:
    """The share of the instructions followed, in both forms that data have."""
    verifier = find("ifeval", "row 1", allow_code=False)
    names, arguments = ["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["blue"], "other": None}]
    for truth in (
        json.dumps({"instruction_id_list": names, "kwargs": arguments}),
        json.dumps([{"instruction_id": names, "kwargs": arguments}]),
    ):
        assert verifier.problem(truth) is None
        assert verifier.score("The sky is blue", truth) == 1
        assert verifier.score("The sky, they say, is blue", truth) == 0.5
        assert verifier.score("", truth) == 0
    assert "unknown" in str(verifier.problem({"instruction_id_list": ["punctuation:none"], "kwargs": [{}]}))


def test_reasoning_gym(tmp_path: Path) -> None:
    """Data of a task know their answers; train and test share no question; part of the points is not right."""
    train, test = make_data("products", tmp_path, 30, 10, 1, {"max_digits": 2})
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, test)]
    questions = [[row["prompt"][0]["content"] for row in part] for part in rows]
    assert [len(set(part)) for part in questions] == [30, 10]
    assert not set(questions[0]) & set(questions[1])
    verifier = find("reasoning_gym", "row 1", allow_code=False)
    for row in rows[1]:
        assert verifier.problem(row["ground_truth"]) is None
        right = verifier.right_answer(row["ground_truth"])
        assert verifier.score(f" {right}\n", row["ground_truth"]) == 1
        assert verifier.score(f"9{right}", row["ground_truth"]) == 0
        assert verifier.score("words", row["ground_truth"]) == 0
    with pytest.raises(UserError, match="different questions"):
        make_data("products", tmp_path, 300, 10, 1, {"min_digits": 1, "max_digits": 1})
    with pytest.raises(UserError, match="reasoning-gym has no task 'chain_sums'"):
        make_data("chain_sums", tmp_path, 3, 1, 1, {})
