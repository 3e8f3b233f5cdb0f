"""BBH's second reading: which answers count, and the share over the samples of several tasks."""

import json
from pathlib import Path

import pytest

from remit_megatron.benchmark import harness
from remit_megatron.benchmark.readings import final_answer, is_right
from remit_megatron.benchmark.suite import ANY_ANSWER, SUITES
from remit_megatron.errors import RunError

(BBH,) = (b for b in SUITES["reasoning"].benchmarks if b.name == "BBH")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Let us see. So the answer is (A).", "(A)"),
        (" so the answer is True", "True"),
        (" The answer is: No.\nAnd more.", "No"),
        (" the answer is 3. No: the answer is 4.", "4"),
        (r" the answer is (A). Finally \boxed{(B)}", "(B)"),
        (r" \boxed{1} and then $\boxed{\text{apple bear}}$.", "apple bear"),
        (r" \boxed{\frac{1}{2}} of it", r"\frac{1}{2}"),
        (r" \boxed{\textbf{\text{No.}}}", "No"),
        (r" cut \boxed{12", "12"),
        (" nothing of the kind", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_options_count_with_and_without_parentheses() -> None:
    assert is_right(r"\boxed{B}", "(B)")
    assert is_right(r"\boxed{(B)}", " (B)")
    assert not is_right(r"\boxed{BB}", "(B)")
    assert not is_right(r"\boxed{(B)}", "B")
    assert not is_right("no answer", "(B)")


def results_of(folder: Path, samples: dict[str, list[tuple[str, str]]]) -> Path:
    """What lm_eval leaves of two of BBH's tasks: answers and targets."""
    sizes = {name: {"effective": len(items)} for name, items in samples.items()}
    content = {
        "results": {BBH.task: {"exact_match,get-answer": 0.25, "exact_match_stderr,get-answer": 0.1}},
        "n-samples": sizes,
        "n-shot": dict.fromkeys(samples, 3),
        "configs": {name: {"dataset_path": "bbh", "output_type": "generate_until"} for name in samples},
    }
    folder.mkdir()
    (folder / "results_1.json").write_text(json.dumps(content))
    for name, items in samples.items():
        lines = [json.dumps({"resps": [[text]], "target": target}) for text, target in items]
        (folder / f"samples_{name}_1.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_both_figures_have_their_names(tmp_path: Path) -> None:
    boxed = [(r"\boxed{A}", "(A)"), ("so the answer is (B).", "(A)"), (r"\boxed{3}", "3")]
    folder = results_of(tmp_path / "out", {"bbh_one": boxed, "bbh_two": [("the answer is yes.", "yes")]})
    record = harness.read_results(folder, BBH)
    assert record["metrics"]["exact_match,get-answer"] == {"value": 0.25, "stderr": 0.1}
    assert record["metrics"][ANY_ANSWER] == {"value": 0.75, "stderr": pytest.approx(0.25)}
    assert record["items"] == 4


def test_without_samples_there_is_no_figure(tmp_path: Path) -> None:
    folder = results_of(tmp_path / "out", {"bbh_one": [("x", "y")]})
    (folder / "samples_bbh_one_1.jsonl").unlink()
    with pytest.raises(RunError, match="left no samples of bbh_one"):
        harness.read_results(folder, BBH)
