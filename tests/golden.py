"""Golden runs: proof that a refactoring moved no number.

    python -m tests.golden BASE HEAD [--only NAME ...] [--jobs 2] [--work FOLDER]

BASE and HEAD are checkouts of this repository. Both run the same short recipes on the same data through their own
`remit` command; each run's metrics.jsonl (timings apart) and every tensor of its last checkpoint, optimizer included,
are compared bit for bit. Cases marked as crossed are run a third time: begun by BASE, stopped by SIGTERM, and finished
by HEAD, which must end with the same bits. `make golden BASE=REVISION` compares a revision with the working tree.
With --work, what BASE alone gave is kept in a folder and not run again by a later call.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TIMING = ("step_ms", "score_ms", "data_ms", "wait_ms", "tokens_per_s", "mfu", "ranks", "scored_online")
VOCAB, EOD, SEQUENCE, SAMPLES, STEPS = 61, 0, 16, 8, 10
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "pp2vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "dp2": (2, {}),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ntp": {"name": "ntp"},
    "remit": {"name": "remit"},
    "document": {"name": "remit", "centering": "document"},
    "shuffled": {"name": "remit", "shuffle": True},
    "unclipped": {"name": "remit", "clip": False},
    "rho1": {"name": "rho1"},
    "rho1_microbatch": {"name": "rho1", "scope": "microbatch"},
    "rho1_global": {"name": "rho1", "scope": "global"},
    "kd": {"name": "kd", "kd_alpha": 0.7, "temperature": 1.5},
    "kd_top": {"name": "kd", "top_k": 7},
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    layout: str = ""
    objective: str = "remit"
    sections: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    command: tuple[str, ...] = ()
    """More words of `remit train`."""
    scores: str | None = None
    """Key of [reference] that names a folder of scores of this case's own; `scores` is made ahead."""
    crossed: bool = False


def cases() -> list[Case]:
    found = [Case(name, objective=name, crossed=name in ("ntp", "remit", "kd")) for name in OBJECTIVES]
    for layout in ("tp2", "pp2vpp2", "cp2", "dp2"):
        for objective in ("ntp", "remit", "kd_top", "rho1_global", "document"):
            if (layout, objective) in (("pp2vpp2", "document"), ("tp2", "document")):
                continue
            crossed = objective == "remit"
            found.append(Case(f"{objective}_{layout}", layout, objective, crossed=crossed))
    chunks = {"compute": {"loss_head": "sequence_chunks"}}
    merged = {"reference": {"merge_microbatches": 2, "round_scores": True}}
    stopping = {"reference": {"queue": {"fallback": "stop", "timeout_s": 120}}, "watchdog": {"step_timeout_s": 300}}
    found += [
        Case("chunks_ntp", objective="ntp", sections=chunks),
        Case("chunks_remit_cp2", "cp2", sections=chunks),
        Case("merged", sections=merged),
        Case("masked", sections={"data": {"document_mask": True, "eod_mask_loss": True}}),
        Case("cached", scores="scores", crossed=True),
        Case("cached_cp2", "cp2", scores="scores"),
        Case("cached_rho1_pp2vpp2", "pp2vpp2", "rho1", scores="scores"),
        Case("kept", scores="write_scores", crossed=True),
        Case("kept_dp2", "dp2", scores="write_scores"),
        Case("kept_cp2", "cp2", scores="write_scores"),
        Case("queued", sections=stopping, command=("--scorers", "1"), crossed=True),
        Case("queued_kept", sections=stopping, command=("--scorers", "1"), scores="write_scores"),
        Case("recorded", sections={"logging": {"tokens_every_steps": 5}}),
    ]
    return found


def make_data(folder: Path) -> None:
    from data_prep.writer import write_dataset

    generator = np.random.default_rng(0)
    for name, count in (("train", 240), ("held", 40)):
        starts, steps = generator.integers(1, 40, count), generator.integers(1, 4, count)
        lengths = generator.integers(5, 60, count)
        documents = [list((s + d * np.arange(n)) % 60 + 1) for s, d, n in zip(starts, steps, lengths, strict=True)]
        write_dataset(str(folder / name), documents, vocab_size=VOCAB, eod_id=EOD)


def prepare(data: Path, base: Path) -> None:
    """The datasets, and the frozen model of all cases: next-token prediction by `base` from another seed."""
    from remit_megatron import toml

    if (data / "reference" / "DONE").exists():
        return
    data.mkdir(parents=True, exist_ok=True)
    make_data(data)
    settings = recipe(Case("reference", objective="ntp"), data, data / "reference") | {"seed": 7}
    path, log = data / "reference.toml", data / "reference.log"
    path.write_text(toml.dumps(settings))
    finish(remit(base, "train", str(path), "--nproc", "1", log=log), log)


def recipe(case: Case, data: Path, run: Path) -> dict[str, Any]:
    """The case's settings as TOML has them."""
    tokens = SEQUENCE * SAMPLES
    settings: dict[str, Any] = {
        "run": str(run),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB,
            "tied_embeddings": case.layout != "tp2",
        },
        "objective": OBJECTIVES[case.objective],
        "data": {
            "sequence_length": SEQUENCE,
            "train": [{"path": str(data / "train")}],
            "eval": {"held": str(data / "held")},
            "cache_dir": str(data / "index"),
        },
        "parallel": LAYOUTS[case.layout][1],
        "batch": {"global_batch_tokens": tokens, "microbatch_samples": 2},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"train_tokens": STEPS * tokens, "warmup_tokens": 2 * tokens},
        "compute": {"device": "cpu", "threads": 1},
        "evaluation": {"every_steps": 4, "samples": 5},
        "checkpoint": {"every_steps": 4, "keep": 2},
    }
    if case.objective != "ntp":
        settings["reference"] = {"path": str(data / "reference")}
    if case.scores:
        settings["reference"][case.scores] = str(run.with_name(f"{run.name}.scores"))
    for section, values in case.sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def remit(checkout: Path, *words: str, log: Path) -> subprocess.Popen[bytes]:
    """The command `remit` of a checkout, with its output in `log`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *words]
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=checkout)


def finish(process: subprocess.Popen[bytes], log: Path, accepted: tuple[int, ...] = (0,)) -> None:
    if process.wait(timeout=600) not in accepted:
        raise SystemExit(f"golden: exit code {process.returncode}:\n{log.read_text()[-3000:]}")


def run_case(case: Case, data: Path, folder: Path, begun_by: Path, finished_by: Path) -> dict[str, Any]:
    """What a case gives: its metrics and a hash of each of its checkpoint's tensors."""
    from remit_megatron import toml

    run, log = folder / case.name, folder / f"{case.name}.log"
    path = folder / f"{case.name}.toml"
    path.write_text(toml.dumps(recipe(case, data, run)))
    ranks = ["--nproc", str(LAYOUTS[case.layout][0])]
    if case.scores == "scores":
        finish(remit(begun_by, "score", str(path), *ranks, log=log), log)
    words = ["train", str(path), *ranks, *case.command]
    if begun_by != finished_by:
        process = remit(begun_by, *words, log=log)
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        finish(process, log, accepted=(0, 75))
    finish(remit(finished_by, *words, log=log), log)
    return {"metrics": metrics_of(run), "tensors": tensors_of(run, folder / f"{case.name}.pt")}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def tensors_of(run: Path, scratch: Path) -> dict[str, str]:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoints = run / "checkpoints"
    dcp_to_torch_save(checkpoints / (checkpoints / "latest").read_text().strip(), scratch)
    state = torch.load(scratch, weights_only=False)
    scratch.unlink()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first thing in which two results differ, in words."""
    if len(a["metrics"]) != len(b["metrics"]):
        return f"{len(a['metrics'])} and {len(b['metrics'])} lines of metrics"
    for one, other in zip(a["metrics"], b["metrics"], strict=True):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return f"step {one.get('step')}: {key} {one.get(key)!r} and {other.get(key)!r}"
    names = [name for name in sorted(a["tensors"].keys() | b["tensors"].keys())]
    different = [name for name in names if a["tensors"].get(name) != b["tensors"].get(name)]
    return f"tensor {different[0]} and {len(different) - 1} more" if different else None


def compare(case: Case, data: Path, folder: Path, base: Path, head: Path) -> list[str]:
    """One line a comparison; those that differ begin with DIFFERENT."""
    parts = {}
    routes = [("base", base, base), ("head", head, head)] + ([("crossed", base, head)] if case.crossed else [])
    for name, begun_by, finished_by in routes:
        place = folder / name
        place.mkdir(exist_ok=True)
        kept = place / f"{case.name}.json"
        if name == "base" and kept.exists():
            parts[name] = json.loads(kept.read_text())
            continue
        for leftover in place.glob(f"{case.name}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        parts[name] = run_case(case, data, place, begun_by, finished_by)
        kept.write_text(json.dumps(parts[name]))
    lines = []
    for name in list(parts)[1:]:
        found = difference(parts["base"], parts[name])
        verdict = f"DIFFERENT {case.name} ({name}): {found}" if found else f"equal {case.name} ({name}):"
        lines.append(verdict if found else f"{verdict} loss {parts[name]['metrics'][-1]['loss']!r}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.golden")
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder that keeps what BASE gave; default: a temporary one")
    arguments = parser.parse_args()
    base, head = arguments.base.resolve(), arguments.head.resolve()
    chosen = [case for case in cases() if not arguments.only or case.name in arguments.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.work or Path(scratch)).resolve()
        data = folder / "data"
        prepare(data, base)
        lines = []
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            for found in pool.map(lambda case: compare(case, data, folder, base, head), chosen):
                print(*found, sep="\n", flush=True)
                lines += found
    different = [line for line in lines if line.startswith("DIFFERENT")]
    print(f"{len(lines)} comparisons of {len(chosen)} cases, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
