"""lm-evaluation-harness as a process: what it needs, how it is called, and what its results and its log say."""

import functools
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.benchmark.model import without_ranks
from remit_megatron.benchmark.readings import share_right
from remit_megatron.benchmark.suite import LM_EVAL_VERSION, Benchmark
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.errors import RunError, UserError
from remit_megatron.hf.tokenizer import has_tokenizer
from remit_megatron.outside import parse_object
from remit_megatron.processes import die_with_parent

SEEDS = "0,1234,1234,1234"
"""Of random, numpy, torch and the choice of examples: lm_eval's own defaults."""
BACKENDS = {"hf": ("torch", "transformers", "accelerate"), "vllm": ("vllm",)}
"""The modules that each needs."""
PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({
    "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch", "vllm")},
    "missing": [name for name in sys.argv[1:] if u.find_spec(name) is None],
}))
"""
SHORTENED = re.compile(r"Left truncation applied|exceeds (model's )?max(imum)? length")
"""What lm_eval's two backends log where a prompt is too long for the model."""
WRONG = ((5, 8), (5, 13))
"""From and up to which transformers splits OLMo 2's numbers wrongly."""
MESSAGE_CHARACTERS = 300
DEFAULT_GEN_TOKS = 256
"""Tokens of an answer, where neither the task nor the user says how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every task of an evaluation is run with."""

    backend: str
    python: str
    chat: bool
    model_args: Mapping[str, Any]
    """Arguments of lm_eval's model class besides the folder."""
    gen_kwargs: Mapping[str, Any]
    """Arguments of generation that replace a task's own."""
    limit: int | None
    """Items of each task (of a group: of each of its tasks); None: all."""
    include_path: Path | None
    device: str | None
    batch_size: str


def probe(python: str, backend: str, benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Versions of the packages that decide figures, as that interpreter has them.

    Raises UserError, with what to install, where it cannot evaluate these benchmarks.
    """
    needed = [*BACKENDS[backend], *dict.fromkeys(name for b in benchmarks for name in b.modules)]
    try:
        done = subprocess.run([python, "-c", PROBE, *needed], capture_output=True, text=True, env=without_ranks())
    except OSError as error:
        raise UserError(f"--python {python}: cannot be started: {error.strerror or error}") from None
    if done.returncode:
        raise UserError(f"--python {python}: is no Python that works: {last_line(done.stderr)}")
    found = json.loads(done.stdout)
    versions = {name: version for name, version in found["versions"].items() if version is not None}
    remedy = "pip install 'remit-megatron[eval]', or name another interpreter with --python"
    if "lm_eval" not in versions:
        raise UserError(f"lm_eval is not installed for {python}: {remedy}")
    if versions["lm_eval"] != LM_EVAL_VERSION:
        raise UserError(
            f"{python} has lm_eval {versions['lm_eval']}, and the suites are of {LM_EVAL_VERSION}: {remedy}"
        )
    if found["missing"]:
        raise UserError(f"{python} lacks {', '.join(found['missing'])}, which these benchmarks import: {remedy}")
    return versions


def check_splitting(versions: Mapping[str, str], model_type: str) -> None:
    """Raise UserError where transformers would split this model's text into other tokens than it was trained on."""
    version = versions.get("transformers", "0")
    if model_type == "olmo2" and WRONG[0] <= tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < WRONG[1]:
        raise UserError(f"transformers {version} splits OLMo 2's numbers wrongly: install 5.13 or later for --python")


def command(benchmark: Benchmark, model: Path, settings: Settings, output: Path, runs_code: bool) -> list[str]:
    """How lm_eval is called for one task; it writes its results below `output`."""
    arguments = json.dumps({"pretrained": str(model), **settings.model_args})
    line = [settings.python, "-m", "lm_eval", "run", "--model", settings.backend, "--model_args", arguments]
    line += ["--tasks", benchmark.task, "--seed", SEEDS, "--batch_size", settings.batch_size]
    line += ["--output_path", str(output), "--log_samples"]
    if settings.gen_kwargs:
        line += ["--gen_kwargs", *(f"{key}={value!r}" for key, value in settings.gen_kwargs.items())]
    if benchmark.few_shot is not None:
        line += ["--num_fewshot", str(benchmark.few_shot)]
    if settings.device is not None:
        line += ["--device", settings.device]
    if settings.limit is not None:
        line += ["--limit", str(settings.limit)]
    if settings.include_path is not None:
        line += ["--include_path", str(settings.include_path)]
    if settings.chat:
        line += ["--apply_chat_template"]
    if runs_code:
        line += ["--confirm_run_unsafe_code"]
    return line


def run(line: list[str], log: Path, runs_code: bool) -> int:
    """Run lm_eval to its end, its output in the file `log`; returns its exit code.

    It and what it started die with this process, and when an exception leaves this function.
    """
    environment = {**without_ranks(), "LMEVAL_LOG_LEVEL": "INFO", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("HF_ALLOW_CODE_EVAL", None)
    if runs_code:
        environment["HF_ALLOW_CODE_EVAL"] = "1"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the workers of vLLM can be ended with it
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def read_results(output: Path, benchmark: Benchmark, model: Path | None = None) -> dict[str, Any]:
    """The figures of one task from what lm_eval wrote below `output`.

    `metrics`: by key, `value` and `stderr` (shares of 1; stderr None where lm_eval has none); `items`: how many were
    evaluated; `few_shot`: the examples that were in the prompts, by lm_eval's own account; `data`: where they came
    from; of a task that generates text `max_gen_toks`, and `cut`: the answers that reach it, as the tokenizer of
    `model` counts them. Raises RunError where something of that is missing.
    """
    found = sorted(output.rglob("results_*.json"))
    if len(found) != 1:
        raise RunError(f"lm_eval ended without an error and left {len(found)} files of results in {output}")
    content = parse_object(found[0].read_bytes(), str(found[0]))
    figures = dict(content["results"].get(benchmark.task, {}))
    for key in benchmark.own:
        name, _, kind = key.partition(",")
        figures[key], figures[f"{name}_stderr,{kind}"] = share_right(output, list(content["n-samples"]))
    metrics = {}
    for key in benchmark.metrics:
        name, _, kind = key.partition(",")
        value, error = figures.get(key), figures.get(f"{name}_stderr,{kind}")
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:  # also NaN
            raise RunError(f"{found[0]}: {key} of {benchmark.task} is {value}, a share of 1 is expected")
        metrics[key] = {"value": value, "stderr": error if isinstance(error, float) else None}
    sizes = {name: size["effective"] for name, size in content["n-samples"].items()}
    shots = sorted({content["n-shot"][name] for name in sizes})
    return {
        "metrics": metrics,
        "items": sum(sizes.values()),
        "few_shot": shots[0] if len(shots) == 1 else shots,
        "data": sorted({_data(config) for config in content["configs"].values()}),
        **_cut(output, content["configs"], model),
    }


def _cut(output: Path, configs: Mapping[str, Any], model: Path | None) -> dict[str, int]:
    """The most tokens of an answer, and how many answers have so many; nothing where no text is generated."""
    limits = {
        name: (config.get("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_GEN_TOKS)
        for name, config in configs.items()
        if config.get("output_type") == "generate_until"
    }
    if not limits:
        return {}
    tokenizer = load_tokenizer(model) if model and has_tokenizer(model) else None
    if tokenizer is None:
        return {"max_gen_toks": max(limits.values())}
    cut = 0
    for name, limit in limits.items():
        for path in output.rglob(f"samples_{name}_*.jsonl"):
            for line in path.read_text().splitlines():
                answers = [text for texts in json.loads(line)["resps"] for text in texts if isinstance(text, str)]
                # A token that was left away at the end of the text, or two that are one when read again.
                cut += any(len(tokenizer.encode(text, add_special_tokens=False).ids) >= limit - 2 for text in answers)
    return {"max_gen_toks": max(limits.values()), "cut": cut}


def count_shortened(log: Path) -> int:
    """Warnings in lm_eval's log that a prompt lost its beginning; one may stand for a batch of prompts."""
    return sum(1 for line in _lines(log.read_text(errors="replace")) if SHORTENED.search(line))


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    return (_lines(text) or ["no message"])[-1][:MESSAGE_CHARACTERS]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _data(config: dict[str, Any]) -> str:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return f"{config.get('dataset_path')}{'' if files is None else ' ' + json.dumps(files, sort_keys=True)}"
