"""Runs Megatron-LM's own scripts, and pretrain_remit.py, on CPU ranks, from the checkout that MEGATRON_LM names."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train import runs

ROOT = Path(__file__).parents[2]
MEGATRON_LM = os.environ.get("MEGATRON_LM", "")
needs_megatron_lm = pytest.mark.skipif(
    not MEGATRON_LM, reason="MEGATRON_LM=FOLDER names a checkout of Megatron-LM core_v0.16.1, and is not set"
)
SCRIPT = str(ROOT / "examples/megatron_lm/pretrain_remit.py")
PRETRAIN_GPT = f"{MEGATRON_LM}/pretrain_gpt.py"
STEPS = 4
TRAIN_TOKENS = 12 * runs.SEQUENCE * runs.SAMPLES


def flags(folder: Path, **changes: Any) -> list[str]:
    """Those that say what `runs.settings` says, and what a CPU without Transformer Engine needs."""
    settings: dict[str, Any] = {
        **{"num-layers": 4, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 4},
        **{"group-query-attention": True, "num-query-groups": 2, "swiglu": True, "disable-bias-linear": True},
        **{"seq-length": runs.SEQUENCE, "max-position-embeddings": runs.SEQUENCE},
        **{"position-embedding-type": "rope", "normalization": "RMSNorm", "norm-epsilon": 1e-5},
        **{"attention-dropout": 0, "hidden-dropout": 0},
        **{"micro-batch-size": 2, "global-batch-size": runs.SAMPLES, "train-iters": 12, "exit-interval": STEPS},
        **{"lr": 3e-3, "min-lr": 1e-7, "lr-decay-style": "cosine", "lr-warmup-iters": 2},
        **{"weight-decay": 0.1, "clip-grad": 1.0, "adam-beta2": 0.95},
        **{"tokenizer-type": "NullTokenizer", "vocab-size": runs.VOCAB - 1, "make-vocab-size-divisible-by": 1},
        **{"data-path": folder / "train", "split": "100,0,0", "num-workers": 0, "no-mmap-bin-files": True},
        **{"no-create-attention-mask-in-dataloader": True, "calculate-per-token-loss": True},
        **{
            "log-interval": 1,
            "eval-iters": 0,
            "eval-interval": 100,
            "distributed-backend": "gloo",
            "use-cpu-initialization": True,
        },
        **{"transformer-impl": "local", "no-persist-layer-norm": True, "no-gradient-accumulation-fusion": True},
        **{"no-masked-softmax-fusion": True, "no-bias-swiglu-fusion": True, "no-bias-dropout-fusion": True},
        **{"no-rope-fusion": True},
    }
    settings |= {name.replace("_", "-"): value for name, value in changes.items()}
    given: list[str] = []
    for name, value in settings.items():
        if value is True:
            given.append(f"--{name}")
        elif value is not False:
            values = value if isinstance(value, list) else [value]
            given += [f"--{name}", *map(str, values)]
    return given


def run(script: str, nproc: int, folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A script under torchrun; `changes` are flags, with underscores."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(nproc), str(ROOT / "examples/megatron_lm/on_cpu.py"), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{MEGATRON_LM}"}
    command = [*launcher, *flags(folder, **changes)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def steps(done: subprocess.CompletedProcess[str]) -> list[dict[str, float]]:
    """What the log says of each iteration. Of a run's second it prints means of the first two, which are undone."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = []
    for line in done.stdout.splitlines():
        if number := re.search(r"iteration +(\d+)/", line):
            pairs = re.findall(r"\| ([a-z _]+): +([-+.\dE]+)", line)
            found.append({"iteration": int(number[1]), **{name: float(value) for name, value in pairs}})
    for name in found[1]:
        if name == "lm loss" or name.startswith("remit "):
            found[1][name] = 2 * found[1][name] - found[0][name]
    return found
