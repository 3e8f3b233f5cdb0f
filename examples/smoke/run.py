"""The smoke run: data, base, reference, mid-training with NTP and with ReMiT, evaluation, report.

Every stage is a command line that a user could type; they are printed. Started again, it goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from examples.smoke.build import QUICK, Settings, build
from examples.smoke.report import write_report
from remit_megatron.errors import RemitError, RunError
from remit_megatron.toml import dump_value

RECIPES = Path(__file__).parent / "recipes"
FOLDER_IN_RECIPES = "runs/smoke"
STAGES = ("base", "reference", "ntp", "remit")
RANKS = 2
"""What the recipes' layout takes."""
MAX_NEW_TOKENS = 48
"""Somewhat more than the longest solution."""
EVALUATION_SAMPLES = 240
QUICK_OVERRIDES = {
    "schedule.train_tokens": 8192,
    "schedule.warmup_tokens": 2048,
    "evaluation.every_steps": 4,
    "evaluation.samples": 16,
}
QUICK_MAX_NEW_TOKENS = 8


def smoke(out: Path, quick: bool) -> str:
    """Do everything under `out` and return the report. Raises RemitError with the exit code of a stage that failed."""
    build(out / "data", QUICK if quick else Settings(), say=_say)
    overrides = QUICK_OVERRIDES if quick else {}
    started = time.monotonic()
    for name in STAGES:
        # One rank halves the start-up; mid-training at TP=2 then reads a checkpoint written by one rank.
        if quick and name in ("base", "reference"):
            remit("train", name, out, {**overrides, "parallel.tensor": 1}, [])
        else:
            remit("train", name, out, overrides, ["--nproc", str(RANKS)])
    _say(f"training took {time.monotonic() - started:.0f} s")
    evaluations = {name: _evaluate(name, out, overrides, quick) for name in STAGES}
    return write_report(out, {name: out / name for name in STAGES}, evaluations)


def _evaluate(name: str, out: Path, overrides: dict[str, Any], quick: bool) -> dict[str, Any]:
    output = out / name / "eval.json"
    arguments = ["--checkpoint", str(out / name), "--problems", str(out / "data" / "problems_held_out.jsonl")]
    arguments += ["--max-new-tokens", str(QUICK_MAX_NEW_TOKENS if quick else MAX_NEW_TOKENS)]
    arguments += ["--output", str(output), *([] if quick else ["--nproc", str(RANKS)])]
    # Ranks share the problems instead of the matrices: decoding one token at a time has little to split.
    changes = {"parallel.tensor": 1, "batch.microbatch_samples": 16, "evaluation.samples": EVALUATION_SAMPLES}
    remit("eval", name, out, {**changes, **overrides}, arguments)
    figures: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return figures


def remit(command: str, name: str, out: Path, overrides: dict[str, Any], arguments: list[str]) -> None:
    """Run `remit COMMAND` with a stage's recipe, moved under `out`. Raises RunError with the exit code of a failure."""
    recipe = RECIPES / f"{name}.toml"
    settings = {**moved(tomllib.loads(recipe.read_text(encoding="utf-8")), out), **overrides}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={dump_value(value)}")]
    line = [command, str(recipe), *arguments, *sets]
    _say("$ remit " + shlex.join(line))
    code = subprocess.run([sys.executable, "-m", "remit_megatron.cli", *line], env=_environment()).returncode
    if code:
        error = RunError(f"smoke: remit {command} of {name} ended with exit code {code}")
        error.exit_code = code if code > 0 else 1
        raise error


def moved(settings: dict[str, Any], out: Path, prefix: str = "") -> dict[str, Any]:
    """Overrides that put the recipe's paths under `out`: key -> value of each setting that names a path there."""
    if out == Path(FOLDER_IN_RECIPES):
        return {}
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and prefix + key != "data.eval":
            changes.update(moved(value, out, f"{prefix}{key}."))
        elif (new := _replaced(value, out)) != value:
            changes[prefix + key] = new
    return changes


def _replaced(value: Any, out: Path) -> Any:
    if isinstance(value, str) and value.startswith(FOLDER_IN_RECIPES + "/"):
        return str(out / value.removeprefix(FOLDER_IN_RECIPES + "/"))
    if isinstance(value, list):
        return [_replaced(item, out) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item, out) for key, item in value.items()}
    return value


def _environment() -> dict[str, str]:
    """Library warnings about parts that are not installed are `remit doctor`'s business."""
    return {"PYTHONWARNINGS": "ignore", **os.environ}


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.smoke", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder (default: {FOLDER_IN_RECIPES}, with --quick: + '-quick')")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: tests the way, learns nothing")
    arguments = parser.parse_args()
    out = arguments.out or Path(FOLDER_IN_RECIPES + ("-quick" if arguments.quick else ""))
    try:
        print("\n" + smoke(out, arguments.quick))
    except RemitError as error:
        print(f"remit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
