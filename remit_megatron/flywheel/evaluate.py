"""A benchmark of one model: `remit benchmark`, or a command of one's own; the figures are the stage's result."""

import json
import math
import sys
from typing import Any

from remit_megatron.data.files import write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import Benchmark
from remit_megatron.flywheel.content import digest
from remit_megatron.flywheel.graph import BENCHMARK, Node
from remit_megatron.flywheel.process import remit, run
from remit_megatron.flywheel.state import LOG
from remit_megatron.posttrain.contract import SPEC, WORK, Manifest, write_manifest
from remit_megatron.posttrain.stage import Stopwatch


def run_benchmark(node: Node, parents: dict[str, str]) -> None:
    """Evaluate and write the manifest, whose `last` has the figures. Raises what the commands' exit codes mean."""
    benchmark, work = node.request, node.folder / WORK
    request = {"format": 1, "name": node.folder.name, "kind": BENCHMARK, "parents": parents, "settings": node.parts}
    write_atomically(node.folder / SPEC, (json.dumps(request, indent=1) + "\n").encode())
    with writing(work):
        work.mkdir(exist_ok=True)
    with Stopwatch(work / "seconds") as clock:
        figures = _figures(node, benchmark)
        manifest = Manifest(
            name=node.folder.name,
            kind=BENCHMARK,
            identity=digest(figures),
            files={},
            parents=parents,
            seconds=round(clock.read(), 1),
            steps=0,
            last=figures,
        )
    write_manifest(node.folder, manifest)


def _figures(node: Node, benchmark: Benchmark) -> dict[str, float]:
    model, work, log = node.parents["model"].path, node.folder / WORK, node.folder / LOG
    if benchmark.suite is not None:
        line = ["benchmark", str(model), "--suite", benchmark.suite, "--output", str(work / "results")]
        remit([*line, *benchmark.arguments], log, node.name)
        return _of_suite(json.loads((work / "results" / "results.json").read_text()))
    path = work / "figures.json"
    path.unlink(missing_ok=True)
    command = [part.replace("{python}", sys.executable) for part in (*benchmark.command, *benchmark.arguments)]
    run([*command, "--model", str(model), "--output", str(path)], log, node.name)
    try:
        content = json.loads(path.read_text())
        figures = {str(name): float(value) for name, value in content.items()}
        if not figures or not all(math.isfinite(value) for value in figures.values()):
            raise ValueError("finite figures are expected")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{node.name}: {path}: an object of figures is expected ({error})") from None
    return figures


def _of_suite(results: dict[str, Any]) -> dict[str, float]:
    """Shares of 1 by task, each task's first metric, and their average where the suite is whole."""
    figures = {}
    for name, task in results["tasks"].items():
        metrics = list(task.get("metrics", {}).values())
        if metrics:
            figures[name] = float(metrics[0]["value"])
    percent = results["average"]["percent"]
    return figures if percent is None else {**figures, "average": percent / 100}
