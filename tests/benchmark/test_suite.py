"""The suites against the installed lm_eval, the paper's tables, and what they look like beside results."""

import json
import re
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from remit_megatron.benchmark import harness, results
from remit_megatron.benchmark.checks import check_model
from remit_megatron.benchmark.model import Model
from remit_megatron.benchmark.paper import REPORTED
from remit_megatron.benchmark.run import _hash_tasks
from remit_megatron.benchmark.suite import LM_EVAL_VERSION, SUITES, Benchmark
from remit_megatron.benchmark.table import table
from remit_megatron.cli import build_parser, main
from remit_megatron.errors import RunError, UserError
from tests.benchmark import tiny
from tests.data_prep import tokenizers
from tests.hf import tiny as hf

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
BASE = SUITES["base"].benchmarks
CALLED = {"pass_at_k": "pass@1"}
"""Metrics that lm_eval's task files name by a function, and what it returns."""


@pytest.fixture(scope="module")
def tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def read_keys(config: dict[str, Any]) -> set[str]:
    """The keys that lm_eval's results have for a task or group, from its file."""
    if "group" in config:
        parts = [(entry["metric"], entry.get("filter_list", "none")) for entry in config["aggregate_metric_list"]]
    else:
        filters = [entry["name"] for entry in config.get("filter_list", [{"name": "none"}])]
        parts = [(entry["metric"].rpartition(".")[2], name) for entry in config["metric_list"] for name in filters]
    return {f"{CALLED.get(metric, metric)},{name}" for metric, name in parts}


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_and_metrics_exist(suite: str, tasks: Any) -> None:
    for benchmark in SUITES[suite].benchmarks:
        config = tasks[benchmark.task].cfg
        assert set(benchmark.metrics) - set(benchmark.own) <= read_keys(config), benchmark.task
        leaves = [tasks[name].cfg for name in config["task"]] if "group" in config else [config]
        assert any(leaf.get("unsafe_code", False) for leaf in leaves) == benchmark.runs_code, benchmark.task
        gated = {leaf["dataset_path"] for leaf in leaves} == {"Idavidrein/gpqa"}
        assert gated == benchmark.gated


def test_examples_that_lm_eval_cannot_be_told(tasks: Any) -> None:
    """A 0 in a task's file is never overridden: of the base suite, in these, for which the paper prints 3."""
    fixed = {b.name for b in BASE if tasks[b.task].cfg.get("num_fewshot") == 0 and b.few_shot}
    assert fixed == {"IFE", "TQA"}


def test_messages_of_lm_eval_that_are_looked_for() -> None:
    """Both backends, both kinds of request: what their sources log of a prompt that is too long."""
    from lm_eval import models

    found = {}
    for name in ("huggingface.py", "vllm_causallms.py", "utils.py"):
        text = (Path(models.__path__[0]) / name).read_text()
        found[name] = len([line for line in text.splitlines() if '"' in line and harness.SHORTENED.search(line)])
    assert found == {"huggingface.py": 2, "vllm_causallms.py": 1, "utils.py": 1}


def test_paper_has_a_figure_for_every_benchmark() -> None:
    for name, rows in REPORTED.items():
        assert all(len(row.scores) == len(SUITES[name].benchmarks) for row in rows)
        assert len({(row.group, row.method) for row in rows}) == len(rows)


@pytest.mark.parametrize("row", [row for rows in REPORTED.values() for row in rows], ids=str)
def test_averages_of_the_paper_recompute(row: Any) -> None:
    assert sum(row.scores) / 10 == pytest.approx(row.average, abs=0.00501)


@pytest.mark.parametrize(
    ("name", "items", "score"),
    [("GSM8K", 1319, 61.64), ("MATH", 5000, 14.50), ("GPQA", 448, 24.55), ("MBPP", 500, 9.2), ("TQA", 817, 25.58)],
)
def test_figures_are_counts_of_whole_test_sets(name: str, items: int, score: float) -> None:
    (benchmark,) = (b for b in BASE if b.name == name)
    assert benchmark.items == items
    assert round(100 * round(score * items / 100) / items, 2) == score


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


STUB = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    print(json.dumps({probe}))
else:
    print(json.dumps([sys.argv[1:], os.environ.get("HF_ALLOW_CODE_EVAL")]))
    sys.exit("ValueError: no more today")
"""


def stub(path: Path, versions: dict[str, str], missing: list[str]) -> str:
    """An interpreter whose lm_eval fails, after it has said how it was called."""
    checked = {"differ": [], "begins": [], "finite": True, "why": None}
    path.write_text(STUB.format(python=sys.executable, probe={"versions": versions, "missing": missing, **checked}))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "model", steps=0)


def test_code_runs_only_when_allowed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    python = stub(tmp_path / "python", {"lm_eval": LM_EVAL_VERSION}, [])
    out = tmp_path / "out"
    line = [
        "benchmark",
        str(model),
        "--suite",
        "base",
        "--output",
        str(out),
        "--python",
        python,
        "--tasks",
        "HE",
        "GPQA",
    ]
    assert main(line) == 1
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    assert tasks["HE"]["state"] == "not run"
    assert tasks["GPQA"]["state"] == "failed"
    assert tasks["GPQA"]["reason"].startswith("ValueError: no more today (its data are gated")
    assert not (out / "logs" / "humaneval.log").exists()
    arguments, allowed = json.loads((out / "logs" / "gpqa_main_n_shot.log").read_text().splitlines()[0])
    assert allowed is None
    assert "--confirm_run_unsafe_code" not in arguments
    assert main([*line, "--allow-code-execution"]) == 1
    arguments, allowed = json.loads((out / "logs" / "humaneval.log").read_text().splitlines()[0])
    assert allowed == "1"
    assert "--confirm_run_unsafe_code" in arguments
    arguments, allowed = json.loads((out / "logs" / "gpqa_main_n_shot.log").read_text().splitlines()[0])
    assert allowed is None, "only what runs code may"
    assert "2 tasks failed (GPQA, HE)" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and no output folder."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    for path in model.glob("*.safetensors*"):
        (bare / path.name).symlink_to(path)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in [*model.glob("*.safetensors*"), model / "config.json", model / "tokenizer.json"]:
        (plain / path.name).symlink_to(path)
    pythons = {
        "none": stub(tmp_path / "none", {}, []),
        "old": stub(tmp_path / "old", {"lm_eval": "0.4.9"}, []),
        "poor": stub(tmp_path / "poor", {"lm_eval": LM_EVAL_VERSION}, ["antlr4"]),
        "wrong": stub(tmp_path / "wrong", {"lm_eval": LM_EVAL_VERSION, "transformers": "5.12.1"}, []),
    }
    linked, elsewhere = tmp_path / "linked", tmp_path / "elsewhere"
    for folder in (linked, elsewhere):
        folder.mkdir()
    (elsewhere / "task.yaml").write_text("task: x\n")
    (linked / "mine").symlink_to(elsewhere)
    (linked / "own.yaml").write_text("task: y\n")
    misspelt = tmp_path / "misspelt"
    misspelt.mkdir()
    for name in ("own.yaml", "x.yml"):
        (misspelt / name).write_text("task: y\n")
    good, suite, out = str(model), ["--suite", "base"], ["--output", str(tmp_path / "out")]
    cases = {
        "needs MODEL, --suite, --output": [],
        "suite 'base' has no 'GSM8k', did you mean 'GSM8K'?": [good, *suite, *out, "--tasks", "GSM8k"],
        "suite 'base' has no 'zzz': it has GSM8K": [good, *suite, *out, "--tasks", "zzz"],
        "has no tokenizer (tokenizer.json": [str(bare), *suite, *out],
        "has no chat template": [str(plain), "--suite", "post", *out],
        "--like goes with a checkpoint": [good, *suite, *out, "--like", good],
        "is no folder with task files": [good, *suite, *out, "--include-path", str(model)],
        f"does not follow the link {linked / 'mine'}, and would leave its tasks out": [
            *(good, *suite, *out, "--include-path", str(linked))
        ],
        f"lm_eval reads .yaml alone, and would leave {misspelt / 'x.yml'} out": [
            *(good, *suite, *out, "--include-path", str(misspelt))
        ],
        "--batch-size 0": [good, *suite, *out, "--batch-size", "0"],
        "--set-gen-kwargs 'x': KEY=VALUE": [good, *suite, *out, "--set-gen-kwargs", "x"],
        "--set-model-args 'pretrained=x': KEY=VALUE is expected": [
            good,
            *suite,
            *out,
            "--set-model-args",
            "pretrained=x",
        ],
        "result of `remit benchmark` ": ["--table", str(model)],
        "--table prints results that are there": [good, "--table", str(model)],
        "cannot be started": [good, *suite, *out, "--python", str(tmp_path / "absent")],
        "is no folder: name another": [good, *suite, "--output", str(model / "config.json" / "x")],
        "lm_eval is not installed": [good, *suite, *out, "--python", pythons["none"]],
        "has lm_eval 0.4.9, and the suites are of 0.4.13": [good, *suite, *out, "--python", pythons["old"]],
        "lacks antlr4": [good, *suite, *out, "--python", pythons["poor"]],
        "splits OLMo 2's numbers wrongly": [good, *suite, *out, "--python", pythons["wrong"]],
    }
    for message, arguments in cases.items():
        assert main(["benchmark", *arguments]) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as unknown:
        main(["benchmark", good, "--suite", "pre", *out])
    assert unknown.value.code == 2


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(line) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_model_arguments_keep_their_types(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = stub(tmp_path / "python", {"lm_eval": LM_EVAL_VERSION}, [])
    pairs = ["a=4", "b=0.5", "c=True", "d=false", "e=auto"]
    line = ["benchmark", str(model), "--suite", "base", "--output", str(tmp_path / "out"), "--python", python]
    assert main([*line, "--tasks", "TQA", "--backend", "vllm", "--set-model-args", *pairs]) == 1
    arguments, _ = json.loads((tmp_path / "out" / "logs" / "truthfulqa_mc1.log").read_text().splitlines()[0])
    wanted = {"pretrained": str(model), "a": 4, "b": 0.5, "c": True, "d": False, "e": "auto"}
    assert json.loads(arguments[arguments.index("--model_args") + 1]) == wanted
    assert arguments[arguments.index("--batch_size") + 1] == "auto"
    assert "--apply_chat_template" not in arguments
    assert "--gen_kwargs" not in arguments
    more = ["--set-gen-kwargs", "max_gen_toks=512", "until=\\n"]
    assert main([*line[:5], str(tmp_path / "other"), *line[6:], "--tasks", "TQA", *more]) == 1
    arguments, _ = json.loads((tmp_path / "other" / "logs" / "truthfulqa_mc1.log").read_text().splitlines()[0])
    start = arguments.index("--gen_kwargs") + 1
    assert arguments[start : start + 2] == ["max_gen_toks=512", "until='\\\\n'"], "as literals of Python"
    kept = json.loads((tmp_path / "other" / "results.json").read_text())
    assert kept["settings"]["gen_kwargs"] == {"max_gen_toks": 512, "until": "\\n"}
    assert "with gen_kwargs = {}, now" in refused(
        [*line, "--backend", "vllm", "--set-model-args", *pairs, *more], capsys
    )


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


def test_a_checked_model(tmp_path: Path, model: Path) -> None:
    """What transformers makes of a Llama 2 kind of tokenizer: other splits and a first token, both said."""
    folder = tmp_path / "llama"
    tokenizers.save("sentencepiece", folder)
    hf.save(hf.make_model("llama", vocab_size=700), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (start,) = (token["id"] for token in content["added_tokens"] if token["content"] == "<s>")
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [start], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": template}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True, "legacy": True}))
    checked = check_model(sys.executable, "cpu", Model("m", "0", folder, None), folder, {"transformers": "5"})
    assert checked.record["begins_with"] == [start]
    assert checked.record["differ"] > 0
    assert "splits " in checked.warnings[0]
    assert f"prompts begin with the tokens [{start}]" in checked.warnings[1]


def test_a_model_without_finite_logits_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    tiny.save_model(folder, steps=0)
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights or logits are not finite"):
        check_model(sys.executable, "cpu", Model("m", "0", folder, None), folder, {})


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


def test_commands_of_the_page() -> None:
    """tests/benchmark/test_command.py and tests/analysis run them; here, that each is one that the program has."""
    first, second = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    *lines, analysis = [shlex.split(line, comments=True) for line in (first + second).replace("\\\n", " ").splitlines()]
    assert {tuple(words[:2]) for words in lines} == {(".venv/bin/remit", "benchmark")}
    parsed = [build_parser().parse_args(words[1:]) for words in lines]
    assert [arguments.suite for arguments in parsed] == ["base", "base", "post", "base", "base", None, "base"]
    assert [arguments.kept for arguments in parsed] == [False] * 6 + [True]
    assert build_parser().parse_args(analysis[1:]).results == ["FOLDER", "OTHER_FOLDER"]


def test_suites_of_the_page() -> None:
    """Its table names the suites' benchmarks, in order."""
    for suite in SUITES.values():
        (cell,) = re.findall(rf"^\| `{suite.name}` \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
        assert re.findall(r"[A-Z][\w+ -]*\w\+?", re.sub(r"\([^)]*\)", "", cell)) == [b.name for b in suite.benchmarks]


def test_local_tasks_are_known_by_all_files(tmp_path: Path) -> None:
    """Data and templates beside the tasks decide figures too; caches of Python and hidden files do not."""
    known = set()
    for name in ("task.yaml", "utils.py", "few_shot.jsonl", "sub/prompt.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        known.add(_hash_tasks(tmp_path))
    assert len(known) == 4
    (tmp_path / "few_shot.jsonl").write_text("changed")
    changed = _hash_tasks(tmp_path)
    assert changed not in known
    (tmp_path / "__pycache__").mkdir()
    for name in ("__pycache__/utils.cpython-311.pyc", ".swp"):
        (tmp_path / name).write_text("")
    assert _hash_tasks(tmp_path) == changed


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
