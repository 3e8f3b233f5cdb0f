"""`results.json` of an evaluation: what was evaluated and how, each task's figures, and their average.

It is rewritten after each task, so that a killed evaluation goes on with the tasks that are not done.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from remit_megatron.benchmark.suite import SUITES, Benchmark, Suite
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError
from remit_megatron.outside import problem, quote, read_object

NAME = "results.json"
FORMAT = 1
UNSAID: dict[str, Any] = {"gen_kwargs": {}}
"""What results of before, which lack a setting, were made with."""
DONE, FAILED, NOT_RUN = "done", "failed", "not run"
"""States of a task."""


class Metric(BaseModel):
    """One figure of a task."""

    value: float = Field(ge=0, le=1, allow_inf_nan=False)


class Task(BaseModel):
    """What is read of a task's record."""

    task: str
    state: Literal["done", "failed", "not run"]
    metrics: dict[str, Metric] = {}
    remarks: list[str] = []
    reason: str = ""

    @model_validator(mode="after")
    def _complete(self) -> "Task":
        if self.state == DONE and not self.metrics:
            raise ValueError("a task that is done has metrics")
        return self


class Standing(BaseModel):
    """Where a run stood at a checkpoint."""

    run: str
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    identity: str


class Source(BaseModel):
    """The model that was evaluated."""

    source: str
    identity: str
    checkpoint: Standing | None = None
    """None of a Hugging Face folder, and of a checkpoint that lies in no run."""


class Stored(BaseModel):
    """What is read of `results.json`."""

    model: Source
    settings: dict[str, Any]
    tasks: dict[str, Task]

    @model_validator(mode="after")
    def _of_its_suite(self) -> "Stored":
        suite = SUITES.get(str(self.settings.get("suite")))
        if suite is None:
            raise ValueError(f"settings.suite: one of {', '.join(SUITES)} is expected")
        known = {benchmark.name: benchmark for benchmark in suite.benchmarks}
        for name, task in self.tasks.items():
            if name not in known:
                raise ValueError(f"tasks: suite '{suite.name}' has no '{name[:40]}'")
            if task.state == DONE and not set(known[name].metrics) <= task.metrics.keys():
                raise ValueError(f"tasks.{name}.metrics: {', '.join(known[name].metrics)} are expected")
        return self


def read(folder: Path) -> dict[str, Any]:
    """What `results.json` of a folder holds. Raises UserError where it holds no results of this format."""
    path = folder / NAME
    content = read_object(path, "result of `remit benchmark`")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {quote(str(content.get('format')), 40)}, this program reads {FORMAT}")
    try:
        Stored.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: is no result of `remit benchmark`: {problem(error)}: name another folder") from None
    return content


def read_same(folder: Path, model: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks in a folder's results; none where it has no results yet.

    Raises UserError naming what differs, unless they are of this model and these settings.
    """
    if not (folder / NAME).exists():
        return {}
    known = read(folder)
    remedy = "name another folder with --output, or remove that one"
    theirs = known["model"]
    if theirs["identity"] != model["identity"]:
        raise UserError(
            f"{folder} holds the results of another model ({theirs['source']}, {theirs['identity']}; this is "
            f"{model['source']}, {model['identity']}): {remedy}"
        )
    for key in settings:
        if known["settings"].get(key, UNSAID.get(key)) != settings[key]:
            raise UserError(
                f"{folder} holds results with {key} = {json.dumps(known['settings'].get(key, UNSAID.get(key)))}, now "
                f"{json.dumps(settings[key])}: {remedy}"
            )
    return known["tasks"]


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the results with their average. Raises RunError where the disk refuses."""
    suite = SUITES[content["settings"]["suite"]]
    tasks = {b.name: content["tasks"][b.name] for b in suite.benchmarks if b.name in content["tasks"]}
    whole = {**content, "tasks": tasks, "average": average(suite, tasks)}
    write_atomically(folder / NAME, (json.dumps(whole, indent=1) + "\n").encode())


def average(suite: Suite, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over all benchmarks of a suite, in percent: of each task's first metric, and of its lowest and highest.

    `missing` names the benchmarks without a figure; where there is one, there is no average.
    """
    missing = [b.name for b in suite.benchmarks if tasks.get(b.name, {}).get("state") != DONE]
    means: dict[str, float | None] = {"percent": None, "lowest": None, "highest": None}
    if not missing:
        figures = [scores(b, tasks[b.name]) for b in suite.benchmarks]
        picks = {"percent": [f[0] for f in figures], "lowest": map(min, figures), "highest": map(max, figures)}
        means = {key: sum(values) / len(figures) for key, values in picks.items()}
    return {**means, "missing": missing}


def scores(benchmark: Benchmark, task: Mapping[str, Any]) -> list[float]:
    """The figures of a finished task in percent, in the order of the benchmark's metrics."""
    return [100 * task["metrics"][key]["value"] for key in benchmark.metrics]


def caveats(benchmark: Benchmark, task: Mapping[str, Any], backend: str, model_args: Mapping[str, Any]) -> list[str]:
    """What a reader of a figure should know of how lm_eval came to it: of the task, and of how it was run."""
    found = list(benchmark.caveats)
    if task["few_shot"]:
        found.append("the examples are drawn anew for another number of ranks")
    by_likelihood = benchmark.metrics[0].startswith("acc")
    if by_likelihood and backend == "hf" and "softmax_dtype" not in model_args:
        found.append(
            "log-likelihoods of a bfloat16 model are summed in bfloat16, and tie: --set-model-args "
            "softmax_dtype=float32"
        )
    return found


def remarks(benchmark: Benchmark, task: Mapping[str, Any], limit: int | None) -> list[str]:
    """What keeps a finished task's figures from being comparable with the paper's."""
    found = []
    if limit is not None:
        found.append(f"limited to {limit} items: not comparable")
    elif task["items"] != benchmark.items:
        found.append(f"{task['items']:,} items, the paper's test set has {benchmark.items:,}")
    if benchmark.few_shot is not None and task["few_shot"] != benchmark.few_shot:
        found.append(f"{task['few_shot']} examples in the prompt, the paper states {benchmark.few_shot}")
    if task.get("cut"):
        found.append(
            f"{task['cut']:,} of {task['items']:,} answers end after {task['max_gen_toks']:,} tokens, cut: "
            "--set-gen-kwargs max_gen_toks=N"
        )
    if task["shortened"]:
        where = f"{task['shortened']} warnings in {task['log']}"
        found.append(f"prompts longer than the model's context lost their beginning ({where})")
    return found
