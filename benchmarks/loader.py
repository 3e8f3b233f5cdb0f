"""How many tokens a second the loaders give to a training loop that does nothing else.

    python -m benchmarks.loader --output benchmarks/results/loader.json

Loaders take turns on the same samples: those of a run over a .bin/.idx of random documents, assembled as in training
(tokens, labels, loss mask, segments). `samples only` is without a loader; `packed` gathers samples without GPTDataset,
bit for bit the same; DALI appears where it is installed.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tokenize import machine
from data_prep.writer import DatasetWriter
from remit_megatron.config import Data
from remit_megatron.data.indexed import open_index
from remit_megatron.data.loader import BatchPlan, make_loader
from remit_megatron.data.packed import PackedSamples, open_packed
from remit_megatron.data.samples import assemble
from remit_megatron.mcore.datasets import TrainingData, open_source

EOD = 0
VOCAB_SIZE = 50_000
FIGURES = ("mtok_per_s", "mtok_per_cpu_s", "wait_ms_median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--microbatch-samples", type=int, default=8)
    parser.add_argument("--document-tokens", type=int, default=1000, help="mean length of a document")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of the dataset")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, packed = make_data(Path(folder), arguments)
        rounds: list[dict[str, Any]] = [
            {"round": number, "loader": name, **measure(name, data, packed, arguments)}
            for number in range(arguments.rounds)
            for name in loaders()
        ]
    medians = {
        name: {key: round(statistics.median(r[key] for r in rounds if r["loader"] == name), 2) for key in FIGURES}
        for name in loaders()
    }
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    report = {"machine": machine(), "settings": settings, "rounds": rounds, "medians": medians}
    text = json.dumps(report, indent=1) + "\n"
    print(json.dumps(medians, indent=1), file=sys.stderr)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


def loaders() -> list[str]:
    present = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return ["samples only", "packed samples only", "default", "default, packed", *(["dali"] if present else [])]


def make_data(folder: Path, arguments: argparse.Namespace) -> tuple[TrainingData, PackedSamples]:
    """A dataset of random documents as a run opens it, and its packed samples without GPTDataset."""
    generator = np.random.default_rng(0)
    count = arguments.tokens // arguments.document_tokens
    lengths = generator.geometric(1 / arguments.document_tokens, count) + 1
    writer = DatasetWriter(folder / "data", vocab_size=VOCAB_SIZE)
    tokens = generator.integers(1, VOCAB_SIZE, int(lengths.sum()))
    tokens[np.cumsum(lengths) - 1] = EOD
    writer.append(tokens, lengths)
    writer.commit(eod_id=EOD)
    prefix = str(folder / "data")
    settings = {"sequence_length": arguments.sequence_length, "train": [{"path": prefix}]}
    data = Data.model_validate(settings)
    source = open_source(prefix, data, VOCAB_SIZE)
    total = arguments.steps * arguments.microbatch_samples
    (index,) = {path.parent for path in (folder / ".index").rglob("*document_index.npy")}
    return TrainingData([source], data, total), open_packed(open_index(prefix), index)


def measure(name: str, data: TrainingData, packed: PackedSamples, arguments: argparse.Namespace) -> dict[str, float]:
    """Feed `steps` steps of one microbatch and look at every one."""
    length, size = arguments.sequence_length, arguments.microbatch_samples

    def packed_sample(n: int) -> dict[str, Any]:
        return assemble(packed.text(data.order[n][1]), data.data, EOD, n)

    sample = packed_sample if "packed" in name else data.sample
    for n in (0, 1, len(packed) + 3):  # both give the same, in a second epoch too
        assert np.array_equal(packed_sample(n)["tokens"], data.sample(n)["tokens"])
    start, cpu = time.perf_counter(), time.process_time()
    waits = [0.0]
    if "only" in name:
        for n in range(arguments.steps * size):
            assert sample(n)["tokens"].shape == (length,)
    else:
        plan = BatchPlan(first_sample=0, num_steps=arguments.steps, num_microbatches=1, microbatch_samples=size)
        loader = make_loader(name.split(",")[0], sample, plan, device=torch.device(arguments.device))
        waits = []
        for step in loader:
            assert step.microbatches[0]["tokens"].shape == (size, length)
            waits.append(step.wait_ms)
        loader.close()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = arguments.steps * size * length
    return {
        "mtok_per_s": tokens / wall / 1e6,
        "mtok_per_cpu_s": tokens / cpu / 1e6,
        "wait_ms_median": statistics.median(waits),
    }


if __name__ == "__main__":
    main()
