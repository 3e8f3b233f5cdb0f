"""What is written of an evaluation, the table that is made of it, and files that are not what was written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from remit_megatron.benchmark import harness, results
from remit_megatron.benchmark.paper import REPORTED
from remit_megatron.benchmark.suite import SUITES, Benchmark
from remit_megatron.benchmark.table import table
from remit_megatron.cli import main
from remit_megatron.errors import RunError

BASE = SUITES["base"].benchmarks


def record(benchmark: Benchmark, shares: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    metrics = {key: {"value": share, "stderr": 0.01} for key, share in zip(benchmark.metrics, shares, strict=True)}
    done = {"task": benchmark.task, "state": "done", "metrics": metrics, "items": benchmark.items, "log": "logs/x.log"}
    whole = {**done, "few_shot": benchmark.few_shot, "shortened": 0, **changes}
    return {**whole, "remarks": results.remarks(benchmark, whole, None)}


def write_results(folder: Path, tasks: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    content = {"format": 1, "model": {"source": "m", "identity": "0" * 16}, "settings": {"suite": "base", **settings}}
    results.write(folder, {**content, "tasks": tasks})
    return folder


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with all tasks, and one that has a failed one; the first 3 lines, the last of the paper's, the notes."""
    monkeypatch.chdir(tmp_path)
    ours = {b.name: record(b, (0.5, 0.25)[: len(b.metrics)]) for b in BASE}
    ours["IFE"] = record(BASE[4], (0.3, 0.7), few_shot=0)
    ours["HE"] = record(BASE[5], (0.1,), shortened=2, items=163)
    write_results(Path("all"), ours)
    failed = {"GSM8K": record(BASE[0], (0.1, 0.2)), "TQA": {"task": "x", "state": "failed", "reason": "no data"}}
    write_results(Path("part"), failed)
    assert main(["benchmark", "--table", "all", "part"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "| model | GSM8K | MATH | GPQA | BBH | IFE | HE | MBPP | TQA | ARC-C | MMLU-Pro | Avg. |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| all | 50.00 / 25.00 | 50.00 / 25.00 | 50.00 / 25.00 | 50.00 | 30.00 / 70.00* | 10.00* | 50.00 | 50.00 | "
        "50.00 / 25.00 | 50.00 | 44.00* |",
        "| part | 10.00 / 20.00 | - | - | - | - | - | - | - | - | - | - |",
    ]
    assert len(lines[4 : lines.index("")]) == len(REPORTED["base"])
    assert lines[lines.index("") - 1] == (
        "| paper, Table 1: Youtu-LLM-2B, ReMiT | 52.69 | 24.50 | 29.69 | 47.21 | 36.93 | 39.94 | 47.00 | 27.42 | "
        "54.61 | 25.85 | 38.58 |"
    )
    assert lines[lines.index("") + 2 :] == [
        "- all, IFE: 0 examples in the prompt, the paper states 3",
        "- all, HE: 163 items, the paper's test set has 164",
        "- all, HE: prompts longer than the model's context lost their beginning (2 warnings in logs/x.log)",
        "- part: no average; not evaluated: MATH, GPQA, BBH, IFE, HE, MBPP, ARC-C, MMLU-Pro",
        "- part, TQA: failed: no data",
    ]
    average = json.loads((tmp_path / "all" / "results.json").read_text())["average"]
    assert average.pop("missing") == []
    assert average == pytest.approx({"percent": 44.0, "lowest": 34.0, "highest": 48.0})


def test_table_has_a_part_for_each_suite(tmp_path: Path) -> None:
    folders = [write_results(tmp_path / suite, {}, suite=suite) for suite in SUITES]
    parts = re.findall(r"^\| model .*$", table(folders), re.MULTILINE)
    assert [len(part.split("|")) - 4 for part in parts] == [10, 10, 7, 4, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": {"gsm8k": {"exact_match,strict-match": float("nan")}}}, "is nan, a share of 1"),
        ({"results": {"gsm8k": {}}}, "is None, a share of 1"),
        (None, "left 0 files"),
    ],
)
def test_results_that_say_nothing_are_a_failure(content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results_1.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        harness.read_results(tmp_path, BASE[0])


BROKEN: dict[str, Any] = {
    "no valid JSON": "{",
    "is no JSON object": [],
    "format 2, this program reads 1": {"format": 2},
    "tasks: Field required": {"format": 1, "model": {"source": "m", "identity": "0"}, "settings": {"suite": "base"}},
    "settings.suite: one of base, post": {"settings": {"suite": ["base"]}},
    "tasks: suite 'base' has no 'x'": {"tasks": {"x": {"task": "x", "state": "failed"}}},
    "tasks.GSM8K.state: Input should be 'done', 'failed' or 'not run'": {"tasks": {"GSM8K": {"task": "g", "state": 1}}},
    "a task that is done has metrics": {"tasks": {"GSM8K": {"task": "gsm8k", "state": "done"}}},
    "tasks.GSM8K.metrics: exact_match,strict-match": {
        "tasks": {"GSM8K": {"task": "gsm8k", "state": "done", "metrics": {"acc,none": {"value": 0.5}}}}
    },
    "less than or equal to 1": {
        "tasks": {"GSM8K": {"task": "g", "state": "done", "metrics": {"acc,none": {"value": 50.0}}}}
    },
}


@pytest.mark.parametrize("message", list(BROKEN))
def test_broken_results_are_refused_in_a_line(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"format": 1, "model": {"source": "m", "identity": "0"}, "settings": {"suite": "base"}, "tasks": {}}
    content = BROKEN[message]
    if isinstance(content, dict) and "format" not in content:
        content = {**whole, **content}
    (tmp_path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["benchmark", "--table", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "results.json" in error
    assert len(error.splitlines()) == 1


def test_answers_that_were_cut_are_counted(tmp_path: Path, model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    long = tokenizer.decode(list(range(300, 330)))
    count = len(tokenizer.encode(long, add_special_tokens=False).ids)
    content = {
        "results": {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.5}},
        "n-samples": {"gsm8k": {"effective": 3}},
        "n-shot": {"gsm8k": 8},
        "configs": {"gsm8k": {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": count}}},
    }
    (tmp_path / "results_1.json").write_text(json.dumps(content))
    lines = [json.dumps({"resps": [[text]]}) + "\n" for text in (long, "4", long + "\n more")]
    (tmp_path / "samples_gsm8k_1.jsonl").write_text("".join(lines))
    found = harness.read_results(tmp_path, BASE[0], model)
    assert (found["max_gen_toks"], found["cut"]) == (count, 2)
    said = results.remarks(BASE[0], {**found, "shortened": 0, "items": 1319}, None)
    assert said == [f"2 of 1,319 answers end after {count} tokens, cut: --set-gen-kwargs max_gen_toks=N"]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("gsm8k/gsm8k-cot-zeroshot.yaml", "The answer is 18", "1"),
        ("gsm8k/gsm8k-cot-zeroshot.yaml", "The answer is 18.", "18"),
        ("gsm8k/gsm8k.yaml", "#### 18", "18"),
        ("bbh/cot_fewshot/_cot_fewshot_template_yaml", "So the answer is valid", "vali"),
        ("bbh/cot_fewshot/_cot_fewshot_template_yaml", "So the answer is valid.", "valid"),
    ],
)
def test_patterns_that_lose_an_answers_end(file: str, text: str, found: str) -> None:
    """The caveats of BBH, and of GSM8K after post-training, are true of the installed task files."""
    import lm_eval

    lines = (Path(lm_eval.__path__[0]) / "tasks" / file).read_text()
    pattern = json.loads(re.findall(r"regex_pattern: (\".*\")", lines)[0])
    assert re.findall(pattern, text) == [found]


@pytest.mark.parametrize(
    ("backend", "model_args", "few_shot", "said"),
    [
        ("hf", {}, 25, ["the examples are drawn anew", "log-likelihoods of a bfloat16 model"]),
        ("hf", {"softmax_dtype": "float32"}, 25, ["the examples are drawn anew"]),
        ("vllm", {}, 0, []),
    ],
)
def test_caveats_of_how_a_task_was_run(backend: str, model_args: Any, few_shot: int, said: list[str]) -> None:
    (arc,) = (each for each in BASE if each.name == "ARC-C")
    found = results.caveats(arc, {"few_shot": few_shot}, backend, model_args)
    assert len(found) == len(said)
    assert all(line.startswith(words) for line, words in zip(found, said, strict=True))
    gsm8k = next(each for each in SUITES["post"].benchmarks if each.name == "GSM8K")
    assert results.caveats(gsm8k, {"few_shot": 0}, "hf", {}) == [
        "the strict pattern drops the answer's last digit where nothing follows it"
    ]
