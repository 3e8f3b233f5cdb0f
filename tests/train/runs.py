"""Small real runs for the trainer's tests: a dataset with structure, a recipe, and many runs in one spawn."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.writer import write_dataset
from remit_megatron.config import parse_recipe
from remit_megatron.errors import RemitError
from tests.objectives.around import Around

VOCAB, EOD, SEQUENCE, SAMPLES = 61, 0, 16, 8
TIMING = ("step_ms", "score_ms", "data_ms", "wait_ms", "scored_online", "tokens_per_s", "mfu", "ranks")


def make_data(folder: Path) -> None:
    """train and held: arithmetic progressions modulo 60, so that there is something to learn."""
    generator = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        starts, steps = generator.integers(1, 40, count), generator.integers(1, 4, count)
        lengths = generator.integers(5, 60, count)
        return [list((s + d * np.arange(n)) % 60 + 1) for s, d, n in zip(starts, steps, lengths, strict=True)]

    for name, count in (("train", 300), ("held", 40)):
        write_dataset(str(folder / name), documents(count), vocab_size=VOCAB, eod_id=EOD)


def settings(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """A recipe as a dictionary; `changes` are whole sections, merged key by key."""
    recipe: dict[str, Any] = {
        "run": str(folder / run),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB,
            "tied_embeddings": True,
        },
        "data": {
            "sequence_length": SEQUENCE,
            "train": [{"path": str(folder / "train")}],
            "eval": {"held": str(folder / "held")},
        },
        "batch": {"global_batch_tokens": SEQUENCE * SAMPLES, "microbatch_samples": 2},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"train_tokens": 12 * SEQUENCE * SAMPLES, "warmup_tokens": 2 * SEQUENCE * SAMPLES},
        "compute": {"device": "cpu", "threads": 1},
        "evaluation": {"every_steps": 6, "samples": 5},
        "checkpoint": {"every_steps": 6, "keep": 3},
    }
    for section, values in changes.items():
        if isinstance(values, dict):
            recipe.setdefault(section, {}).update(values)
        else:
            recipe[section] = values
    return recipe


def remit(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """The same with the co-located reference of the run `base`."""
    changes = {"objective": {"name": "remit"}, "reference": {"path": str(folder / "base")}, **changes}
    return settings(folder, run, **changes)


def train_all(
    rank: int, recipes: list[Any], poisons: list[Any] | None = None, fallback: bool = False
) -> list[tuple[int, str]]:
    """On one rank: run recipes one after the other; (exit code, message) of each.

    poisons: for each recipe (rank, steps): on that rank the loss of those steps is multiplied by NaN.
    """
    import torch
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process, StopSignals
    from remit_megatron.train.loop import start

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    outcomes = []
    for recipe, (poisoned_rank, steps) in zip(recipes, poisons or [(0, [])] * len(recipes), strict=True):
        trainer = None
        try:
            trainer = start(parse_recipe(recipe), process, fallback=fallback)
            if poisons:
                trainer.step.forward_step.objective = _Poisoned(trainer, steps if rank == poisoned_rank else [])
            trainer.run(StopSignals())
            outcomes.append((0, ""))
        except RemitError as error:
            outcomes.append((error.exit_code, str(error)))
        finally:
            if trainer is not None:
                trainer.close()
            dist.barrier()
            destroy_groups()
    return outcomes


class _Poisoned(Around):
    def __init__(self, trainer: Any, steps: list[int]):
        super().__init__(trainer.parts.objective)
        self.trainer, self.steps = trainer, steps

    def __call__(self, stats: Any) -> Any:
        import dataclasses

        out = self.inner(stats)
        if self.trainer.step.progress.meta.step + 1 in self.steps:
            out = dataclasses.replace(out, loss_sum=out.loss_sum * float("nan"))
        return out


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def weights(folder: Path, run: str) -> dict[str, bytes]:
    """Every tensor of a run's newest checkpoint, bit for bit, optimizer included."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoints = folder / run / "checkpoints"
    path = checkpoints / (checkpoints / "latest").read_text().strip()
    dcp_to_torch_save(path, folder / "weights.pt")
    state = torch.load(folder / "weights.pt", weights_only=False)
    found = {k: v.contiguous().numpy().tobytes() for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert found
    return found


def command(recipe: Path, nproc: int, *overrides: str) -> list[str]:
    parts = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "train", str(recipe), "--nproc", str(nproc)]
    return parts + [part for override in overrides for part in ("--set", override)]


def start(recipe: Path, nproc: int, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The command as a user starts it, with its output in `log`."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command(recipe, nproc, *overrides), stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def wait_for(condition: Any, process: subprocess.Popen[bytes], timeout_s: float = 120) -> bool:
    """Until `condition()` holds (True) or the process ends (False)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    raise AssertionError("the run did not get there in time")
