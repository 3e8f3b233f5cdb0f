"""Results beside the paper's, as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from remit_megatron.benchmark import results
from remit_megatron.benchmark.paper import REPORTED, Row
from remit_megatron.benchmark.suite import SUITES, Benchmark, Suite


def table(folders: Sequence[Path]) -> str:
    """One table a suite: a row a folder, then the paper's rows of that suite, in percent.

    A cell has a task's figures in the order of its metrics, which the line below the table names; `-` stands for a
    task that is not done, `*` for a figure with a remark, which follows. Raises UserError for a folder without results.
    """
    contents = [(folder, results.read(folder)) for folder in folders]
    parts = []
    for suite in SUITES.values():
        ours = [(folder, content) for folder, content in contents if content["settings"]["suite"] == suite.name]
        if ours:
            parts.append(_one(suite, ours))
    return "\n\n".join(parts)


def _one(suite: Suite, ours: list[tuple[Path, dict[str, Any]]]) -> str:
    heads = ["model", *(b.name for b in suite.benchmarks), "Avg."]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_line(_own_row(suite, folder, content)) for folder, content in ours]
    lines += [_line(_paper_row(row)) for row in REPORTED.get(suite.name, ())]
    readings = "; ".join(f"{b.name}: {' / '.join(b.metrics)}" for b in suite.benchmarks)
    notes = [f"Percent. Averages are of each cell's first figure. {readings}."]
    notes += [f"- {note}" for folder, content in ours for note in _notes(suite, folder, content)]
    return "\n".join([*lines, "", *notes])


def _own_row(suite: Suite, folder: Path, content: dict[str, Any]) -> list[str]:
    cells = [_cell(b, content["tasks"].get(b.name, {})) for b in suite.benchmarks]
    average = results.average(suite, content["tasks"])["percent"]
    return [str(folder), *cells, "-" if average is None else f"{average:.2f}" + "*" * any("*" in c for c in cells)]


def _cell(benchmark: Benchmark, task: dict[str, Any]) -> str:
    if task.get("state") != results.DONE:
        return "-"
    return " / ".join(f"{score:.2f}" for score in results.scores(benchmark, task)) + "*" * bool(task.get("remarks"))


def _paper_row(row: Row) -> list[str]:
    name = f"paper, Table {row.table}: {row.group}, {row.method}"
    return [name, *(f"{score:.2f}" for score in row.scores), f"{row.average:.2f}"]


def _notes(suite: Suite, folder: Path, content: dict[str, Any]) -> Iterable[str]:
    for warning in (content.get("checks") or {}).get("warnings", ()):
        yield f"{folder}: {warning}"
    absent = [b.name for b in suite.benchmarks if b.name not in content["tasks"]]
    if absent:
        yield f"{folder}: no average; not evaluated: {', '.join(absent)}"
    for b in suite.benchmarks:
        task = content["tasks"].get(b.name, {})
        if task and task["state"] != results.DONE:
            yield f"{folder}, {b.name}: {task['state']}: {task['reason']}"
        for remark in task.get("remarks", ()):
            yield f"{folder}, {b.name}: {remark}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
