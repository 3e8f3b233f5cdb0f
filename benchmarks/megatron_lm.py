"""Megatron-LM's own script beside `remit train`, and with ReMiT in it: step time and peak memory, on CPU ranks.

    MEGATRON_LM=FOLDER python -m benchmarks.megatron_lm --nproc 2 --rounds 5 --output benchmarks/results/mlm-tp2.json
    MEGATRON_LM=FOLDER python -m benchmarks.megatron_lm --shape tiny --rounds 1 --steps 4     # does it run?

One set of weights, one dataset and one layout (tensor parallelism over --nproc ranks); the arms run one after the
other, round by round, each in processes of its own:

    gpt     pretrain_gpt.py, next-token prediction
    train   `remit train`, objective ntp
    remit   pretrain_remit.py, a reference of the student's size

Of a run it takes the median of its steps without the first two, and the largest resident set of a process. Ratios are
of arms in one round, and reported as the median over the rounds. MEGATRON_LM is a checkout of core_v0.16.1.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.writer import write_dataset
from remit_megatron.errors import UserError

ROOT = Path(__file__).parents[1]
ON_CPU = ROOT / "examples/megatron_lm/on_cpu.py"
ARMS = ("gpt", "train", "remit")
LIMITS = {"train/gpt": 1.00, "remit/gpt": 1.36, "train/gpt memory": 0.80}
SKIPPED_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model and of a step."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    vocab: int
    length: int
    microbatch_samples: int
    samples: int


SHAPES = {
    "tiny": Shape(layers=2, width=32, feed_forward=64, heads=4, vocab=128, length=16, microbatch_samples=2, samples=4),
    # Matrix products take nearly all of a step.
    "small": Shape(
        layers=6, width=512, feed_forward=1408, heads=8, vocab=32768, length=512, microbatch_samples=2, samples=4
    ),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run of one arm."""

    step_ms: float
    peak_gib: float


def recipe(shape: Shape, folder: Path, run: str, nproc: int, steps: int, init: bool) -> str:
    """`remit train`'s next-token prediction."""
    start = f'init = "{folder}/base"' if init else ""
    return f"""
run = "{folder}/{run}"
[model]
{start}
num_layers = {shape.layers}
hidden_size = {shape.width}
ffn_hidden_size = {shape.feed_forward}
num_attention_heads = {shape.heads}
vocab_size = {shape.vocab}
tied_embeddings = false
[data]
sequence_length = {shape.length}
train = [{{ path = "{folder}/corpus" }}]
[batch]
global_batch_tokens = {shape.samples * shape.length}
microbatch_samples = {shape.microbatch_samples}
[optimizer]
peak_lr = 1e-4
[schedule]
train_tokens = {steps * shape.samples * shape.length}
[parallel]
tensor = {nproc}
distributed_optimizer = false
[compute]
device = "cpu"
threads = 1
"""


def flags(shape: Shape, folder: Path, nproc: int, steps: int) -> list[str]:
    """The same for Megatron-LM."""
    text = f"""
    --num-layers {shape.layers} --hidden-size {shape.width} --ffn-hidden-size {shape.feed_forward}
    --num-attention-heads {shape.heads} --seq-length {shape.length} --max-position-embeddings {shape.length}
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size {shape.microbatch_samples} --global-batch-size {shape.samples} --train-iters {steps}
    --lr 1e-4 --min-lr 1e-7 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95
    --tensor-model-parallel-size {nproc} --calculate-per-token-loss --distributed-backend gloo
    --tokenizer-type NullTokenizer --vocab-size {shape.vocab - 1} --make-vocab-size-divisible-by 1
    --data-path {folder}/corpus --split 100,0,0 --num-workers 0 --no-mmap-bin-files
    --no-create-attention-mask-in-dataloader --log-interval 1 --eval-iters 0 --eval-interval 1000
    --use-cpu-initialization --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --load {folder}/weights --finetune
    """
    return text.split()


def run(command: list[str], folder: Path) -> tuple[str, float]:
    """A command's output, and the largest resident set of a process in it, GiB. Raises UserError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ['MEGATRON_LM']}"}
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise UserError(f"{' '.join(command[:8])} ... ended with {process.returncode}:\n{text[-3000:]}")
    return text, usage.ru_maxrss / 2**20


def measure(arm: str, shape: Shape, folder: Path, nproc: int, steps: int, number: int) -> Measured:
    """One run of one arm."""
    if arm == "train":
        name = f"train-{number}"
        path = folder / f"{name}.toml"
        path.write_text(recipe(shape, folder, name, nproc, steps, init=True))
        command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "train", str(path)]
        _, peak_gib = run([*command, "--nproc", str(nproc)], folder)
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        found = [float(json.loads(line)["step_ms"]) for line in lines]
    else:
        script = f"{os.environ['MEGATRON_LM']}/pretrain_gpt.py"
        more: list[str] = []
        if arm == "remit":
            script = str(ROOT / "examples/megatron_lm/pretrain_remit.py")
            more = ["--remit-reference", str(folder / "weights")]
        launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(nproc), str(ON_CPU), script]
        text, peak_gib = run([*command, *flags(shape, folder, nproc, steps), *more], folder)
        found = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    if len(found) != steps:
        raise UserError(f"{arm}: {len(found)} steps in the log, {steps} expected")
    return Measured(statistics.median(found[SKIPPED_STEPS:]), peak_gib)


def prepare(shape: Shape, folder: Path) -> None:
    """A dataset, and weights for all arms: one step of `remit train`, whose learning rate changes nothing to time."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, shape.vocab - 1, 4 * shape.length).tolist() for _ in range(256)]
    write_dataset(str(folder / "corpus"), documents, vocab_size=shape.vocab, eod_id=shape.vocab - 1)
    path = folder / "base.toml"
    path.write_text(recipe(shape, folder, "base", 1, 1, init=False))
    remit = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]
    run([*remit, "train", str(path)], folder)
    run([*remit, "convert", "to-megatron-lm", str(folder / "base"), str(folder / "weights")], folder)


def figures(rounds: list[dict[str, Measured]]) -> dict[str, float]:
    """Ratios, medians over the rounds."""
    return {
        "train/gpt": statistics.median(one["train"].step_ms / one["gpt"].step_ms for one in rounds),
        "remit/gpt": statistics.median(one["remit"].step_ms / one["gpt"].step_ms for one in rounds),
        "train/gpt memory": statistics.median(one["train"].peak_gib / one["gpt"].peak_gib for one in rounds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--nproc", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if "MEGATRON_LM" not in os.environ:
        raise SystemExit("MEGATRON_LM=FOLDER must name a checkout of Megatron-LM core_v0.16.1")
    shape, rounds = SHAPES[arguments.shape], list[dict[str, Measured]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(shape, folder)
        for number in range(arguments.rounds):
            order = ARMS if number % 2 == 0 else ARMS[::-1]
            rounds.append({arm: measure(arm, shape, folder, arguments.nproc, arguments.steps, number) for arm in order})
            shown = ", ".join(
                f"{arm} {rounds[-1][arm].step_ms:.0f} ms {rounds[-1][arm].peak_gib:.2f} GiB" for arm in ARMS
            )
            print(f"round {number + 1}/{arguments.rounds}  {shown}", flush=True)
    found = figures(rounds)
    for ratio, value in found.items():
        print(f"{ratio:<18} {value:.3f}  (limit {LIMITS[ratio]:.2f})")
    if arguments.output:
        measured: list[dict[str, Any]] = [
            {arm: {"step_ms": one[arm].step_ms, "peak_gib": one[arm].peak_gib} for arm in ARMS} for one in rounds
        ]
        content = {"shape": arguments.shape, "nproc": arguments.nproc, "ratios": found, "rounds": measured}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
