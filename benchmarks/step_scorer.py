"""The scorer of benchmarks.step's arm remit-queued: a process beside the one that is timed, with a model of its own."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Parallel
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.mcore import platform
from remit_megatron.scores.manifest import CacheManifest
from remit_megatron.scores.queue import QueueManifest, RunSide, ScorerSide, write_step

AHEAD_STEPS = 4
POLL_S = 0.01


class Queue:
    """The trainers' end, as in a run: rank 0 starts the scorer, reads what that leaves, and sends it to all."""

    def __init__(self, setting: dict[str, Any]):
        self.setting, self.step = setting, 0
        self.waits: list[float] = []
        """Seconds that each step waited."""
        if dist.get_rank() != 0:
            return
        self.folder = Path(tempfile.mkdtemp())
        self._run = RunSide(self.folder, _manifest(setting), timeout_s=600.0)
        self._run.publish(1)
        self._process = get_context("spawn").Process(target=_serve, args=(self.folder, setting), daemon=True)
        self._process.start()
        while not (self.folder / "scorer.json").exists():
            time.sleep(POLL_S)

    def fill(self, batches: list[Microbatch]) -> list[Microbatch]:
        """This rank's part of the microbatches made by `random_batches` with the step's number, with its scores."""
        begun = time.perf_counter()
        scores = torch.empty(_step_samples(self.setting), self.setting["sequence_length"])
        if dist.get_rank() == 0:
            while (look := self._run.look(self.step, _samples(self.setting, self.step))).scores is None:
                if not look.wait:
                    raise RuntimeError(f"the scorer is gone: {look.reason}")
                time.sleep(POLL_S)
            self._run.publish(self.step + 1)
            scores.copy_(torch.from_numpy(look.scores.copy()))
        if dist.get_world_size() > 1:
            dist.broadcast(scores, src=0)
        self.waits.append(time.perf_counter() - begun)
        parts = own_part(self.setting, scores.split(batches[0].num_samples))
        filled = [Scores(ref_nll=part.to(batches[0].tokens.device)) for part in parts]
        return [one.with_scores(found) for one, found in zip(batches, filled, strict=True)]

    def close(self) -> None:
        if dist.get_rank() == 0:
            self._process.terminate()
            self._process.join()
            shutil.rmtree(self.folder)


def random_batches(setting: dict[str, Any], device: torch.device, seed: int) -> list[Microbatch]:
    """A step's microbatches of random tokens, those of all trainers that the scorer serves."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting["microbatch_samples"], setting["sequence_length"] + 1)
    batches = []
    for number in range(setting["num_microbatches"] * setting["scored_trainers"]):
        text = torch.randint(setting["shape"].vocab_size, shape, generator=generator)
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        ids = number * shape[0] + torch.arange(shape[0])
        one = Microbatch(tokens=tokens, labels=labels, loss_mask=torch.ones(shape[0], shape[1] - 1), sample_id=ids)
        batches.append(one.to(device))
    return batches


def own_part(setting: dict[str, Any], microbatches: Sequence[Any]) -> Sequence[Any]:
    """This rank's share of a step's microbatches, as Megatron's data parallelism deals them out."""
    return microbatches[dist.get_rank() :: setting["scored_trainers"]]


def _step_samples(setting: dict[str, Any]) -> int:
    return setting["microbatch_samples"] * setting["num_microbatches"] * setting["scored_trainers"]


def _samples(setting: dict[str, Any], step: int) -> list[tuple[int, int]]:
    count = _step_samples(setting)
    return [(0, step * count + i) for i in range(count)]


def _manifest(setting: dict[str, Any]) -> QueueManifest:
    scores = CacheManifest(
        reference="random weights",
        precision="fp32",
        tokenizer=None,
        sequence_length=setting["sequence_length"],
        data_seed=0,
        document_mask=False,
        eod_mask_loss=False,
        eod_id=None,
        block_samples=1,
        sources=(),
    )
    return QueueManifest(scores=scores, weights=(), step_samples=_step_samples(setting), train_steps=1 << 40)


def _serve(folder: Path, setting: dict[str, Any]) -> None:
    from remit_megatron.mcore import passes
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import Build, build_chunks

    device = platform.activate("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = initialize_groups(Parallel(), seed=1)
    build = Build(device=device, dtype=torch.float32)
    length = setting["sequence_length"]
    chunks, _ = build_chunks(setting["shape"], Parallel(), build, max_sequence_length=length, scorer=True)
    side = ScorerSide(folder, _manifest(setting), AHEAD_STEPS)
    while True:
        step, _ = side.next()
        if step is None:
            time.sleep(POLL_S)
            continue
        batches = random_batches(setting, device, step)
        scores = torch.cat(passes.nll(chunks, batches, groups))
        write_step(folder, step, side.manifest, _samples(setting, step), scores.numpy())
        side.announce(step)
