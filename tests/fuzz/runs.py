"""What runs leave for other commands: status, events, metrics, checkpoints, results of benchmarks."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import remit_megatron.analysis.runs
import remit_megatron.benchmark.table  # noqa: F401 - here, and so by no fork
from remit_megatron.benchmark.suite import SUITES
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.data import checksums
from remit_megatron.errors import UserError
from remit_megatron.presets import student_shape
from remit_megatron.run.checkpoint import CheckpointFolder, Meta, read_meta, write_meta
from remit_megatron.run.folder import RunFolder
from remit_megatron.train.metrics import MetricsFile
from tests.fuzz.framework import Target, register
from tests.fuzz.recipes import RECIPE

STEPS = 6


def prepare(folder: Path) -> None:
    """Two runs of some steps, with one checkpoint each, whose weights are bytes that nobody reads as such."""
    for name in ("base", "run"):
        run = folder / name
        (run / "logs").mkdir(parents=True)
        recipe = parse_recipe({**RECIPE, "run": name})
        (run / "recipe.toml").write_text(dump_toml(recipe))
        lines = [
            {"step": n, "tokens": 128 * n, "loss": 4.0 - n / 10, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0}
            | {"step_ms": 100.0 + n, "tokens_per_s": 1000.0, "ranks": 2, "data_ms": 1.0, "eval/held/nll": 3.0 - n / 20}
            for n in range(1, STEPS + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        status = {"state": "failed", "step": STEPS, "total_steps": 10, "tokens": 768, "loss": 3.4, "exit_code": 1}
        status |= {"reason": "the disk", "updated_unix_s": 1.8e9, "started_unix_s": 1.7e9, "host": "a", "job": "7"}
        (run / "status.json").write_text(json.dumps(status))
        events = ["1700000000\t7.0\tstart\t-1\ton a", "1700000100\t7.0\tend\t6\tit failed (exit code 1)"]
        (run / "logs" / "events.tsv").write_text("".join(f"{line}\n" for line in events))
        (run / "launch.json").write_text(json.dumps({"backend": "local", "jobs": [], "launched_unix_s": 1.7e9}))
        save(run / "checkpoints", recipe.fingerprint())


def save(folder: Path, recipe: str) -> None:
    checkpoints = CheckpointFolder(folder, keep=1)
    partial = checkpoints.begin(STEPS)
    for number in range(2):
        (partial / f"__{number}_0.distcp").write_bytes(bytes(range(100)))
    checksums.write(partial, checksums.of_files(sorted(partial.glob("*.distcp"))))
    shape = student_shape(parse_recipe(RECIPE), None).model_dump()
    meta = Meta(shape=shape, step=STEPS, tokens=768, recipe=recipe, data={"train": "f"}, tokenizer="t")
    write_meta(partial, meta)
    checkpoints.commit(meta)


def analyzed(folder: Path, valid: Path) -> str | None:
    """Hours and tokens, added up again from the lines."""
    figures = json.loads((folder / "out" / "runs.json").read_bytes())["runs"]
    found = next(one for one in figures if one["run"] == "run")
    text = (folder / "run" / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        return "accepted steps that do not rise by one"
    ranks = [line.get("ranks") for line in lines]
    if all(isinstance(n, int | float) and math.isfinite(n) for n in ranks):
        hours = sum(line["step_ms"] * n for line, n in zip(lines, ranks, strict=True)) / 3.6e6
        if not math.isclose(hours, found["device_hours"], rel_tol=1e-9):
            return f"{found['device_hours']} device hours, the lines add up to {hours}"
    return None if found["tokens"] == lines[-1]["tokens"] else "other tokens than the last line's"


def resume() -> None:
    """What a start reads of its run folder before models are built, and the lines that it goes on from."""
    recipe = parse_recipe({**RECIPE, "run": "run"})
    RunFolder(Path("run"), recipe).check()
    path = CheckpointFolder(Path("run/checkpoints"), keep=1).latest()
    if path is None:
        raise UserError("no checkpoint")
    meta = read_meta(path)
    if problems := checksums.problems(path, checksums.read(path), content=True):
        raise UserError(problems[0])
    metrics = MetricsFile(Path("run/metrics.jsonl"), meta.step)
    Path("found.json").write_text(json.dumps({"meta": asdict(meta), "missing": metrics.missing}))
    metrics.close()


def resumed(folder: Path, valid: Path) -> str | None:
    """The checkpoint is the one that was written; the steps kept rise, and those that lack are said to be missing."""
    found = json.loads((folder / "found.json").read_bytes())
    before = read_meta(next((valid / "run" / "checkpoints").glob("step-*")))
    if found["meta"] != json.loads(json.dumps(asdict(before))):
        return "goes on from another meta.json"
    for path in (valid / "run" / "checkpoints").rglob("*.distcp"):
        if (folder / path.relative_to(valid)).read_bytes() != path.read_bytes():
            return f"goes on from a changed {path.name}"
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines()]
    if [float(step) for step in steps] != sorted(set(map(float, steps))):
        return f"goes on with the steps {steps}"
    missing = found["missing"]
    return None if (len(steps) == STEPS) == (missing is None) else f"{len(steps)} lines, missing are {missing}"


def prepare_results(folder: Path) -> None:
    from tests.benchmark.test_results import record, write_results

    suite = SUITES["base"]
    tasks = {one.name: record(one, (0.5, 0.25)[: len(one.metrics)] or (0.5,)) for one in suite.benchmarks[:3]}
    write_results(folder / "results", tasks)


def table(folder: Path, valid: Path) -> str | None:
    content = json.loads((folder / "results" / "results.json").read_bytes())
    for task in content["tasks"].values():
        for metric in task.get("metrics", {}).values() if task["state"] == "done" else ():
            if type(metric["value"]) not in (int, float) or not 0 <= metric["value"] <= 1:
                return f"accepted the figure {metric['value']!r:.60}"
    return None


RUN = ("run/*.json", "run/logs/*", "run/recipe.toml", "run/metrics.jsonl")
CHECKPOINTS = ("run/checkpoints/*/*", "run/checkpoints/latest", "run/metrics.jsonl", "run/recipe.toml")
ANALYZE = ("analyze", "runs", "base", "run", "--metric", "eval/held/nll", "--output", "out")
register(Target("run.status", prepare, RUN, ("status", "run"), kept=("base/*",)))
register(Target("run.metrics", prepare, ("run/metrics.jsonl",), ANALYZE, analyzed, ("base/*",), share=0.15))
register(Target("run.resume", prepare, CHECKPOINTS, resume, resumed, own=True, also=(1,), share=2))
register(
    Target("results", prepare_results, ("results/results.json",), ("benchmark", "--table", "results"), table, share=2)
)
