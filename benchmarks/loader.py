"""How many tokens a second the loaders give to a training loop that does nothing else.

    python -m benchmarks.loader --output benchmarks/results/loader.json

Loaders take turns on the same samples: those of a run over a .bin/.idx of random documents, assembled as in training
(tokens, labels, loss mask, segments). `samples only` is without a loader; `GPTDataset` has Megatron's dataset read the
same samples; DALI appears where it is installed.
"""

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from benchmarks.tokenize import machine
from data_prep.work import claimed
from data_prep.writer import DatasetWriter
from remit_megatron.config import Data
from remit_megatron.data.deal import Deal
from remit_megatron.data.loader import make_loader
from remit_megatron.data.samples import assemble
from remit_megatron.data.steps import BatchPlan
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
        samples = make_samples(Path(folder), arguments)
        rounds: list[dict[str, Any]] = [
            {"round": number, "loader": name, **measure(name, samples, arguments)}
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
    names = ["samples only", "samples only, GPTDataset", "default", "default, GPTDataset"]
    return [*names, *(["dali"] if present else [])]


def make_samples(folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Samples by number from a dataset of random documents, as a run reads them and through Megatron's GPTDataset."""
    generator = np.random.default_rng(0)
    count = arguments.tokens // arguments.document_tokens
    lengths = generator.geometric(1 / arguments.document_tokens, count) + 1
    tokens = generator.integers(1, VOCAB_SIZE, int(lengths.sum()))
    tokens[np.cumsum(lengths) - 1] = EOD
    prefix = str(folder / "data")
    with claimed(prefix) as work:
        writer = DatasetWriter(prefix, work, vocab_size=VOCAB_SIZE)
        writer.append(tokens, lengths)
        writer.commit(eod_id=EOD)
    settings = {"sequence_length": arguments.sequence_length, "train": [{"path": prefix}]}
    data = Data.model_validate(settings)
    total = arguments.steps * arguments.microbatch_samples
    training = TrainingData([open_source(prefix, data, VOCAB_SIZE)], data, total)
    theirs = gpt_dataset(prefix, data)

    def through_megatron(n: int) -> dict[str, Any]:
        k = training.order[n][1]
        text = theirs._query_document_sample_shuffle_indices(k)[0].astype(np.int64)
        return assemble(text, data, EOD, k)

    for n in (0, 1, len(theirs) + 3):  # both give the same, in a second epoch too
        assert np.array_equal(through_megatron(n)["labels"], training.sample(n)["labels"])
    return {"": training.sample, "GPTDataset": through_megatron}


def gpt_dataset(prefix: str, data: Data) -> GPTDataset:
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.sequence_length,
        split="1",
        tokenizer=SimpleNamespace(eod=None, vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)


def measure(
    name: str, samples: dict[str, Callable[[int], dict[str, Any]]], arguments: argparse.Namespace
) -> dict[str, float]:
    """Feed `steps` steps of one microbatch and look at every one."""
    length, size = arguments.sequence_length, arguments.microbatch_samples
    loader_name, _, source = name.partition(", ")
    sample = samples[source]
    start, cpu = time.perf_counter(), time.process_time()
    waits = [0.0]
    if "only" in name:
        for n in range(arguments.steps * size):
            assert sample(n)["tokens"].shape == (length,)
    else:
        deal = Deal(microbatch_samples=size)
        plan = BatchPlan(first_sample=0, num_steps=arguments.steps, num_microbatches=1, deal=deal)
        loader = make_loader(loader_name, sample, plan, device=torch.device(arguments.device))
        waits = []
        for step in loader:
            assert step.microbatches[0].tokens.shape == (size, length)
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
