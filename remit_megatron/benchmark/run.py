"""`remit benchmark`: one task of a suite after the other, each in a process of its own, and what came of them."""

import hashlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from remit_megatron.benchmark import harness, results
from remit_megatron.benchmark.checks import check_model
from remit_megatron.benchmark.model import Model, export_place, find_model, weights_folder
from remit_megatron.benchmark.suite import SUITES, Benchmark, choose
from remit_megatron.data.files import check_place, locked, make_folder, writing
from remit_megatron.errors import RunError, StopRequested, UserError
from remit_megatron.hf.config import read_json
from remit_megatron.processes import STOP_SIGNALS
from remit_megatron.run.checkpoint import CheckpointFolder

NO_CODE = "runs code that the model wrote: --allow-code-execution"
GATED = "its data are gated: accept their terms on the hub and log in, or give local data with --include-path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of an evaluation."""

    model: str
    suite: str
    output: Path
    tasks: tuple[str, ...]
    """Benchmarks of the suite; none: all."""
    settings: harness.Settings
    allow_code: bool
    like: str | None
    drop_export: bool = False
    """Whether a checkpoint's exported weights go when no task is left to do."""


def benchmark(request: Request) -> list[str]:
    """Evaluate a model, going on with what the output folder already holds; results in its `results.json`.

    Returns the names of the benchmarks that failed. Raises UserError before anything is written, StopRequested on a
    signal.
    """
    suite, settings, output = SUITES[request.suite], request.settings, request.output
    chosen = choose(suite, request.tasks)
    check_place(output, "--output")
    runnable = [b for b in chosen if request.allow_code or not b.runs_code]
    versions = harness.probe(settings.python, settings.backend, runnable)
    found = find_model(request.model, request.like, suite.chat)
    harness.check_splitting(versions, read_json(found.like / "config.json").get("model_type", ""))
    model = {"source": request.model, "identity": found.identity, "checkpoint": found.standing}
    kept = {"suite": suite.name, **_kept(settings), "lm_eval": versions["lm_eval"]}
    results.read_same(output, model, kept)
    make_folder(output, "--output")
    with locked(output / ".lock", f"--output: another process evaluates into {output}: wait for it or stop it"):
        known = results.read_same(output, model, kept)  # again: another process may have worked here in between
        content: dict[str, Any] = {"format": results.FORMAT, "model": model, "settings": kept, "tasks": known}
        content["checks"] = results.read(output).get("checks") if known else None
        for skipped in chosen:
            if skipped not in runnable and _state(content, skipped) != results.DONE:
                content["tasks"][skipped.name] = {"task": skipped.task, "state": results.NOT_RUN, "reason": NO_CODE}
                _say(f"{skipped.name} is not run: it {NO_CODE}")
        results.write(output, content)
        todo = [b for b in runnable if _state(content, b) != results.DONE]
        if len(todo) < len(runnable):
            _say(f"{len(runnable) - len(todo)} of {len(runnable)} tasks are there already")
        if todo:
            _run_all(request, content, todo, versions, found)
        failed = [b.name for b in runnable if _state(content, b) == results.FAILED]
        if request.drop_export and not failed:
            shutil.rmtree(export_place(found, output), ignore_errors=True)
    return failed


def of_kept(request: Request) -> list[Request]:
    """A request for each checkpoint that a run keeps, and the last one of a run that is done; a folder each.

    Raises UserError where `request.model` is no run, or it keeps none.
    """
    run = Path(request.model)
    folder = CheckpointFolder(run / "checkpoints", keep=1)
    last = folder.latest() if (run / "DONE").exists() else None
    found = sorted({*folder.kept(), *([last] if last else [])})
    if not found:
        raise UserError(
            f"--kept: {run} has no checkpoint that it keeps: set checkpoint.keep_every_tokens, or make an empty file "
            "KEEP in each of checkpoints/step-N that is to stay"
        )
    return [replace(request, model=str(path), output=request.output / path.name, drop_export=True) for path in found]


def _run_all(
    request: Request, content: dict[str, Any], todo: list[Benchmark], versions: dict[str, str], found: Model
) -> None:
    if request.settings.limit is not None:
        _say(
            f"WARNING: limited to {request.settings.limit} items a task: the figures are not comparable with any others"
        )
    with writing(request.output), _stopping():
        model = weights_folder(found, request.output)
        if (content["checks"] or {}).get("versions") != versions:
            content["checks"] = check_model(
                request.settings.python, request.settings.device, found, model, versions
            ).record
        for warning in content["checks"]["warnings"]:
            _say(f"WARNING: {warning}")
        (request.output / "logs").mkdir(exist_ok=True)
        for number, each in enumerate(todo, 1):
            _say(f"[{number}/{len(todo)}] {each.name} ({each.task}), log in {_log(request.output, each)}")
            record = _run_one(request, each, model)
            content["tasks"][each.name] = {"task": each.task, **record, "versions": versions}
            results.write(request.output, content)
            _say(f"[{number}/{len(todo)}] {each.name}: {_summary(each, record)}")
            for remark in record.get("remarks", ()):
                _say(f"WARNING: {each.name}: {remark}")


def _run_one(request: Request, each: Benchmark, model: Path) -> dict[str, Any]:
    """Run one task; its record in `results.json`."""
    output, log = request.output / "lm_eval" / each.task, _log(request.output, each)
    shutil.rmtree(output, ignore_errors=True)
    runs_code = request.allow_code and each.runs_code
    line = harness.command(each, model, request.settings, output, runs_code)
    began = time.monotonic()
    code = harness.run(line, log, runs_code)
    ran = {
        "seconds": round(time.monotonic() - began, 1),
        "device": request.settings.device,
        "batch_size": request.settings.batch_size,
        "log": str(log.relative_to(request.output)),
    }
    try:
        if code:
            raise RunError(harness.last_line(log.read_text(errors="replace")))
        record = {**harness.read_results(output, each, model), "shortened": harness.count_shortened(log), **ran}
    except RunError as error:
        return {"state": results.FAILED, "reason": str(error) + (f" ({GATED})" if each.gated else ""), **ran}
    remarks = results.remarks(each, record, request.settings.limit)
    caveats = results.caveats(each, record, request.settings.backend, dict(request.settings.model_args))
    return {"state": results.DONE, **record, "remarks": remarks, "caveats": caveats}


def _summary(each: Benchmark, record: dict[str, Any]) -> str:
    if record["state"] == results.FAILED:
        return f"FAILED: {record['reason']}"
    scores = results.scores(each, record)
    figures = ", ".join(f"{score:.2f} {key}" for score, key in zip(scores, each.metrics, strict=True))
    return f"{figures} ({record['items']:,} items, {record['few_shot']}-shot, {record['seconds']:.0f} s)"


def _kept(settings: harness.Settings) -> dict[str, Any]:
    """The settings that decide figures; device and batch size move them by round-off only."""
    return {
        "backend": settings.backend,
        "limit": settings.limit,
        "model_args": dict(settings.model_args),
        "gen_kwargs": dict(settings.gen_kwargs),
        "local_tasks": None if settings.include_path is None else _hash_tasks(settings.include_path),
    }


def _hash_tasks(folder: Path) -> str:
    """Of all files of a folder of tasks, data beside them included, but for hidden ones and Python's caches. Data that
    tasks name elsewhere are not read."""
    total = hashlib.sha256()
    found = (path for path in folder.rglob("*") if path.is_file())
    for path in sorted(found):
        if any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts):
            continue
        total.update(f"{path.relative_to(folder)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def _state(content: dict[str, Any], each: Benchmark) -> str | None:
    return content["tasks"].get(each.name, {}).get("state")


def _log(output: Path, each: Benchmark) -> Path:
    return output / "logs" / f"{each.task}.log"


def _say(text: str) -> None:
    print(f"remit: {text}", file=sys.stderr, flush=True)


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 end the task that runs, and the command."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested("stopped; finished tasks are kept, and the same command goes on")

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
