"""The suites against the installed lm_eval, the paper's tables, and what they look like beside results."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.benchmark import harness
from remit_megatron.benchmark.paper import REPORTED
from remit_megatron.benchmark.suite import SUITES
from remit_megatron.cli import build_parser

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
