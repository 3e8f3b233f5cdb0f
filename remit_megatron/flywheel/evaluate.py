"""A benchmark of one model: `remit benchmark`, or a command of one's own; the figures are the stage's result."""

import json
import math
import sys
from typing import Any

from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.data.files import write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import Benchmark
from remit_megatron.flywheel.content import digest
from remit_megatron.flywheel.graph import BENCHMARK, Node
from remit_megatron.flywheel.mid import share_conversions
from remit_megatron.flywheel.process import remit, run
from remit_megatron.flywheel.state import LOG
from remit_megatron.posttrain.contract import SPEC, WORK, Manifest, write_manifest
from remit_megatron.posttrain.stage import Stopwatch


def run_benchmark(node: Node, parents: dict[str, str]) -> None:
    """Evaluate and write the manifest, whose `last` has the figures. Raises what the commands' exit codes mean."""
    work = node.folder / WORK
    request = {"format": 1, "name": node.folder.name, "kind": BENCHMARK, "parents": parents, "settings": node.parts}
    write_atomically(node.folder / SPEC, (json.dumps(request, indent=1) + "\n").encode())
    with writing(work):
        work.mkdir(exist_ok=True)
    with Stopwatch(work / "seconds") as clock:
        figures = _divergence(node, *node.request) if "reference" in node.parents else _figures(node, node.request)
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


def _divergence(node: Node, benchmark: Benchmark, settings: dict[str, Any], nproc: int) -> dict[str, float]:
    """Mean and quantiles over tokens of KL(reference || model), nats."""
    work = node.folder / WORK
    share_conversions(node)
    recipe = parse_recipe({**settings, "run": str(work / "run")}, "mid.recipe")
    write_atomically(work / "recipe.toml", dump_toml(recipe).encode())
    line = ["analyze", "tokens", str(work / "recipe.toml"), "--models", f"model={node.parents['model'].path}"]
    line += ["--reference", str(node.parents["reference"].path), "--output", str(work / "tokens")]
    line += ["--samples", str(benchmark.samples), "--show", "0", *(["--nproc", str(nproc)] if nproc > 1 else [])]
    remit(line, node.folder / LOG, node.name)
    kl = json.loads((work / "tokens" / "summary.json").read_text())["models"]["model"]["kl"]
    return {"mean": kl["mean"], **kl["quantiles"]}


def _of_suite(results: dict[str, Any]) -> dict[str, float]:
    """Shares of 1 by task, each task's first metric, and their average where the suite is whole."""
    figures = {}
    for name, task in results["tasks"].items():
        metrics = list(task.get("metrics", {}).values())
        if metrics:
            figures[name] = float(metrics[0]["value"])
    percent = results["average"]["percent"]
    return figures if percent is None else {**figures, "average": percent / 100}
