"""Times whole training steps of NTP and of ReMiT with a co-located reference, interleaved in one process.

    python -m benchmarks.step --output benchmarks/results/step-cpu.json
    python -m benchmarks.step --shape tiny --warmup 1 --pairs 2        # does it run? not a measurement

All arms train the same student with the same fused loss, optimizer and batches, so the ratio of their step times is
the price of the reference. For a reference of the student's size the arithmetic limit is 4/3: one forward more beside a
forward and a backward of twice its cost. Times are noisy on a shared machine; the ratio of neighbouring steps is not.

    ntp           no reference
    remit         scored by the reference before each step
    remit-fp8     the same, the reference's linears in FP8
    remit-graph   the same as remit, its pass replayed as a CUDA graph; on CUDA only
    remit-scores  scores come with the batch, as from a cache or a scorer that keeps pace
    remit-queued  scores come from a process that scores beside this one (CPU only)
    rho1          scored as remit; the top 0.8 of each sample's tokens
    kd            the reference's distribution over the whole vocabulary
    kd-kept       64 tokens of it and the rest as one, as from a cache; their reading counts too
    switch        scored as kd; the tokens of the lowest fifth of entropy learn it, the others their labels
    switch-kept   the same from 64 tokens of it

On a CPU the processor time of each step is kept beside its wall time: it hardly moves with what else a machine does.
It is the sum over the data-parallel ranks of --trainers. The scorer of remit-queued can be given the load of more
trainers than run here (--scored-trainers), and arms can be timed over several steps --in-a-row, so that a scorer that
falls behind is waited for.
"""

import argparse
import contextlib
import json
import os
import platform as machine
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.step_figures import CPU_LIMITS, LIMITS, Times, figures, spread, verdict
from benchmarks.step_kept import kept_rows, with_kept
from benchmarks.step_scorer import Queue, own_part, random_batches
from remit_megatron import flops
from remit_megatron.config import Optimizer, Parallel, Schedule
from remit_megatron.data.microbatch import Scores
from remit_megatron.device import resolve_device
from remit_megatron.errors import UserError
from remit_megatron.mcore import compat, platform
from remit_megatron.objectives import KD, NTP, Remit, Rho1, Switch
from remit_megatron.shape import ModelShape

DISTILLING = ("kd", "kd-kept", "switch", "switch-kept")
ARMS = ("ntp", "remit", "remit-fp8", "remit-graph", "remit-scores", "remit-queued", "rho1", *DISTILLING)
CPU_ARMS = ("ntp", "remit", "remit-scores", "remit-queued", "rho1", *DISTILLING)
CUDA_ARMS = ("ntp", "remit", "remit-fp8", "remit-scores", "rho1", *DISTILLING)
SCORED = ("remit", "remit-fp8", "remit-graph", "rho1", "kd", "switch")
"""Arms that run the reference."""
KEPT = ("kd-kept", "switch-kept")
"""Arms whose distributions are read."""
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": ModelShape(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=4,
            kv_channels=8,
            vocab_size=64,
            tied_embeddings=False,
            rope_theta=1e4,
            norm_epsilon=1e-6,
        ),
        "sequence_length": 16,
        "microbatch_samples": 2,
        "num_microbatches": 2,
    },
    # Matrix products take over 90% of a step; small enough for a laptop.
    "small": {
        "shape": ModelShape(
            num_layers=6,
            hidden_size=512,
            ffn_hidden_size=1536,
            num_attention_heads=8,
            num_query_groups=8,
            kv_channels=64,
            vocab_size=8192,
            tied_embeddings=False,
            rope_theta=5e5,
            norm_epsilon=1e-6,
        ),
        "sequence_length": 256,
        "microbatch_samples": 2,
        "num_microbatches": 2,
    },
    "olmo2-1b": {
        "shape": ModelShape(
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_attention_heads=16,
            num_query_groups=16,
            kv_channels=128,
            vocab_size=100352,
            tied_embeddings=False,
            rope_theta=5e5,
            norm_epsilon=1e-6,
        ),
        "sequence_length": 4096,
        "microbatch_samples": 2,
        "num_microbatches": 4,
    },
}


class Bench:
    """A student, its optimizer, a frozen reference of the same shape, and the arms that train with them.

    Every data-parallel rank has one, and calls its methods at the same time as the others.
    """

    def __init__(self, setting: dict[str, Any], device: torch.device, arms: list[str]):
        """Raises UserError where `arms` has remit-fp8 and FP8 cannot run."""
        from remit_megatron.mcore import fp8, optim
        from remit_megatron.mcore.graph import Replayed
        from remit_megatron.mcore.groups import initialize_groups
        from remit_megatron.mcore.model import Build, build_chunks
        from remit_megatron.mcore.step import make_forward_step

        if "remit-graph" in arms and device.type != "cuda":
            raise UserError("the arm remit-graph needs CUDA: leave it out with --arms")
        self.setting, self.device = setting, device
        self.groups = initialize_groups(Parallel(), seed=1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        build = Build(device=device, dtype=dtype)
        length = setting["sequence_length"]
        chunks, config = build_chunks(setting["shape"], Parallel(), build, max_sequence_length=length)
        self.chunks = optim.wrap_ddp(chunks, config, Parallel())
        self.optimizer, _ = optim.build_optimizer(
            self.chunks, Optimizer(peak_lr=1e-4), Schedule(train_tokens=1 << 40), Parallel(), dtype
        )
        reference: list[Any] = []
        if set(SCORED) & set(arms):
            reference, _ = build_chunks(setting["shape"], Parallel(), build, max_sequence_length=length, scorer=True)
        self.products = fp8.quantise(reference, device, dtype) if "remit-fp8" in arms else []
        objectives: dict[str, Any] = {"ntp": NTP(), "rho1": Rho1(), "kd": KD(), "switch": Switch()}
        self.arms = {
            arm: make_forward_step(
                objectives.get(arm.removesuffix("-kept"), Remit()),
                reference,
                groups=self.groups,
                graph=Replayed() if arm == "remit-graph" else None,
            )
            for arm in arms
        }
        self.queue = Queue(setting) if "remit-queued" in arms else None
        self.steps = 0

    def step(self, arm: str) -> Times:
        from remit_megatron.mcore import fp8, optim
        from remit_megatron.mcore.passes import run_schedule

        self.steps += 1
        if arm == "remit-queued" and self.queue:
            self.queue.step += 1
            seed = self.queue.step
        else:
            seed = 1_000_000 + self.steps
        batches = list(own_part(self.setting, random_batches(self.setting, self.device, seed)))
        forward_step = self.arms[arm]
        if arm == "remit-scores":
            batches = [one.with_scores(Scores(ref_nll=torch.rand_like(one.loss_mask) * 12)) for one in batches]
        rows = kept_rows(self.setting, batches) if arm in KEPT else []
        if dist.get_world_size() > 1:
            dist.barrier()
        started = self._mark()
        optim.zero_grads(self.chunks, self.optimizer)
        score = 0.0, 0.0
        if arm == "remit-queued" and self.queue:
            batches = self.queue.fill(batches)
        if arm in KEPT:
            batches = with_kept(batches, rows)
        if arm in SCORED:
            begun = self._mark()
            with contextlib.nullcontext() if arm == "remit-fp8" else fp8.disabled(self.products):
                batches = forward_step.scored(batches)
            score = _seconds(begun, self._mark())
        batches = forward_step.selected(batches, self.chunks)
        run_schedule(forward_step, batches, self.chunks, forward_only=False)
        optim.optimizer_step(self.optimizer, 1.0)
        return self._of_all(Times(*_seconds(started, self._mark()), *score))

    def _of_all(self, times: Times) -> Times:
        """Processor time of all ranks together, wall time of the slowest."""
        if dist.get_world_size() == 1:
            return times
        found = torch.tensor([times] * 2, dtype=torch.float64)
        dist.all_reduce(found[0], op=dist.ReduceOp.MAX)
        dist.all_reduce(found[1])
        return Times(*(found[i % 2, i].item() for i in range(4)))

    def _mark(self) -> tuple[float, float]:
        """Wall time and the process's own."""
        return self._now(), time.process_time()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self, arm: str) -> int:
        """Of the allocator on a GPU, for one more step; of the process so far on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(arm)
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(begun: tuple[float, float], ended: tuple[float, float]) -> tuple[float, float]:
    return ended[0] - begun[0], ended[1] - begun[1]


def measure(bench: Bench, warmup: int, pairs: int, in_a_row: int = 1) -> dict[str, Any]:
    """Interleave the arms; the order within a round alternates, so that none always runs first.

    What counts once is the mean of `in_a_row` steps of an arm.
    """
    times: dict[str, list[Times]] = {arm: [] for arm in bench.arms}
    for i in range(warmup + pairs):
        for arm in list(bench.arms) if i % 2 == 0 else list(bench.arms)[::-1]:
            steps = [bench.step(arm) for _ in range(in_a_row)]
            one = Times(*(statistics.fmean(column) for column in zip(*steps, strict=True)))
            if i >= warmup:
                times[arm].append(one)
    result = figures({arm: [(t.wall, t.score_wall) for t in found] for arm, found in times.items()})
    if bench.device.type == "cpu":
        result["processor_time"] = figures({arm: [(t.cpu, t.score_cpu) for t in found] for arm, found in times.items()})
    return result


def describe(bench: Bench, name: str) -> dict[str, Any]:
    device, setting = bench.device, bench.setting
    cuda = device.type == "cuda"
    return {
        "benchmark": "step",
        "shape": name,
        "model": setting["shape"].model_dump(),
        "trainers": setting["trainers"],
        "scored_trainers": setting["scored_trainers"],
        "tokens_per_step": setting["sequence_length"]
        * setting["microbatch_samples"]
        * setting["num_microbatches"]
        * setting["trainers"],
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "machine": f"{machine.system()} {machine.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "dtype": "bfloat16" if cuda else "float32",
        "versions": {name: compat.version(name) for name in ("torch", "megatron-core", "triton")},
    }


def add_peaks(bench: Bench, result: dict[str, Any]) -> None:
    """Memory, and on a GPU whose peak is known tokens/s, model FLOP utilisation and the verdicts on LIMITS."""
    setting = bench.setting
    if bench.device.type != "cuda":
        result["peak_bytes"] = {"process": bench.peak_bytes(next(iter(bench.arms)))}
        by_cpu = result["processor_time"]
        values = {name: by_cpu["ratios"].get(name, by_cpu.get(name)) for name in CPU_LIMITS}
        if result["shape"] == "small":
            result["verdicts"] = {
                name: verdict(found["median"], *CPU_LIMITS[name]) for name, found in values.items() if found
            }
        return
    result["peak_bytes"] = {arm: bench.peak_bytes(arm) for arm in bench.arms}
    peak = flops.peak_flops(bench.device)
    found = {name: ratio["median"] for name, ratio in result["ratios"].items()}
    if peak and "ntp" in bench.arms:
        per_token = flops.training_flops_per_token(setting["shape"], None, setting["sequence_length"])
        rate = result["tokens_per_step"] / result["step_seconds"]["ntp"]["median"]
        result["ntp_tokens_per_s"] = rate
        result["ntp_mfu"] = found["ntp mfu"] = rate * per_token / peak
    if result["shape"] == "olmo2-1b":
        result["verdicts"] = {name: verdict(value, *LIMITS[name]) for name, value in found.items() if name in LIMITS}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, help="default: olmo2-1b on CUDA, small on CPU")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="default: all that a graph, FP8 or a device do not rule out"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10, help="steps of each arm that count")
    parser.add_argument("--in-a-row", type=int, default=1, help="steps of an arm before the next one's turn")
    parser.add_argument("--trainers", type=int, default=1, help="data-parallel ranks; on a CPU only")
    parser.add_argument(
        "--scored-trainers", type=int, help="trainers whose samples the scorer scores; default: those here"
    )
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError where the options do not go together, or the device cannot do what they ask."""
    scored = options.scored_trainers or options.trainers
    if resolve_device(options.device) == "cuda":
        if options.trainers > 1:
            raise UserError("--trainers: more than one is for a CPU")
        if "remit-queued" in (options.arms or ()):
            raise UserError("the arm remit-queued needs a second device for its scorer and runs on a CPU only here")
    if not 1 <= options.trainers <= scored:
        raise UserError(f"--trainers {options.trainers} --scored-trainers {scored}: at least one, and no fewer scored")
    if options.trainers == 1:
        return run_rank(options, 0, dist.HashStore())
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_spawned, (options, folder), nprocs=options.trainers)
        return json.loads(Path(folder, "result.json").read_text())


def _spawned(rank: int, options: argparse.Namespace, folder: str) -> None:
    result = run_rank(options, rank, dist.FileStore(f"{folder}/store", options.trainers))
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))


def run_rank(options: argparse.Namespace, rank: int, store: dist.Store) -> dict[str, Any]:
    """One data-parallel rank's part; the result is rank 0's."""
    device = platform.activate(options.device)
    cuda = device.type == "cuda"
    name = options.shape or ("olmo2-1b" if cuda else "small")
    # FP8 on a CPU is for tests: its products are slower than float32's.
    arms = list(dict.fromkeys(options.arms or (CUDA_ARMS if cuda else CPU_ARMS)))
    trainers = {"trainers": options.trainers, "scored_trainers": options.scored_trainers or options.trainers}
    dist.init_process_group(platform.backend(device), store=store, rank=rank, world_size=options.trainers)
    try:
        bench = Bench(SHAPES[name] | trainers, device, arms)
        result = describe(bench, name) | measure(bench, options.warmup, options.pairs, options.in_a_row)
        add_peaks(bench, result)
        if bench.queue:
            result["queue_wait_seconds"] = spread(bench.queue.waits[options.warmup * options.in_a_row :])
            bench.queue.close()
    finally:
        dist.destroy_process_group()
    return result


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        result = run(options)
    except UserError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
