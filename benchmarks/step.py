"""Times whole training steps of NTP and of ReMiT with a co-located reference, interleaved in one process.

    python -m benchmarks.step --output benchmarks/results/step-cpu.json

Both arms train the same student with the same fused loss, optimizer and batches, so the ratio of their step times is
the price of the reference. For a reference of the student's size the arithmetic limit is 4/3: one forward more beside a
forward and a backward of twice its cost. Times are noisy on a shared machine; the ratio of neighbouring steps is not.
"""

import argparse
import json
import platform as machine
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Optimizer, Parallel, Schedule
from remit_megatron.mcore import compat, platform
from remit_megatron.objectives import NTP, Remit
from remit_megatron.shape import ModelShape
from remit_megatron.train import flops

SHAPES: dict[str, dict[str, Any]] = {
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
    """A student, its optimizer, a frozen reference of the same shape, and the arms that train with them."""

    def __init__(self, setting: dict[str, Any], device: torch.device):
        from remit_megatron.mcore import optim
        from remit_megatron.mcore.groups import initialize_groups
        from remit_megatron.mcore.model import Build, build_chunks
        from remit_megatron.mcore.step import make_forward_step

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
        reference, _ = build_chunks(setting["shape"], Parallel(), build, max_sequence_length=length, scorer=True)
        self.arms = {
            "ntp": make_forward_step(NTP(), groups=self.groups),
            "remit": make_forward_step(Remit(), reference, groups=self.groups),
        }
        self.generator = torch.Generator().manual_seed(0)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        shape = (self.setting["microbatch_samples"], self.setting["sequence_length"] + 1)
        batches = []
        for _ in range(self.setting["num_microbatches"]):
            text = torch.randint(self.setting["shape"].vocab_size, shape, generator=self.generator)
            one = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(shape[0], shape[1] - 1)}
            batches.append({key: value.contiguous().to(self.device) for key, value in one.items()})
        return batches

    def step(self, arm: str) -> tuple[float, float]:
        """(seconds of the whole step, of which the reference took)."""
        from remit_megatron.mcore import optim
        from remit_megatron.mcore.step import run_schedule

        forward_step, batches = self.arms[arm], self.batches()
        started = self._now()
        optim.zero_grads(self.chunks, self.optimizer)
        scored = started
        if forward_step.objective.needs_reference:
            forward_step.score(batches)
            scored = self._now()
        run_schedule(forward_step, batches, self.chunks, forward_only=False)
        optim.optimizer_step(self.optimizer, 1.0)
        return self._now() - started, scored - started

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


def measure(bench: Bench, warmup: int, pairs: int) -> dict[str, Any]:
    """Interleave the arms; the order within a pair alternates, so that neither always runs first."""
    seconds: dict[str, list[float]] = {arm: [] for arm in bench.arms}
    shares = []
    for i in range(warmup + pairs):
        for arm in list(bench.arms) if i % 2 == 0 else list(bench.arms)[::-1]:
            total, score = bench.step(arm)
            if i >= warmup:
                seconds[arm].append(total)
                if score:
                    shares.append(score / total)
    ratios = [a / b for a, b in zip(seconds["remit"], seconds["ntp"], strict=True)]
    return {
        "step_seconds": {arm: _spread(values) for arm, values in seconds.items()},
        "remit_over_ntp": _spread(ratios),
        "reference_share": _spread(shares),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def describe(bench: Bench, name: str) -> dict[str, Any]:
    device, setting = bench.device, bench.setting
    cuda = device.type == "cuda"
    return {
        "benchmark": "step",
        "shape": name,
        "model": setting["shape"].model_dump(),
        "tokens_per_step": setting["sequence_length"] * setting["microbatch_samples"] * setting["num_microbatches"],
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "machine": f"{machine.system()} {machine.machine()}",
        "dtype": "bfloat16" if cuda else "float32",
        "versions": {name: compat.version(name) for name in ("torch", "megatron-core", "triton")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, help="default: olmo2-1b on CUDA, small on CPU")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = platform.activate(arguments.device)
    name = arguments.shape or ("olmo2-1b" if device.type == "cuda" else "small")
    dist.init_process_group(platform.backend(device), store=dist.HashStore(), rank=0, world_size=1)
    bench = Bench(SHAPES[name], device)
    result = describe(bench, name) | measure(bench, arguments.warmup, arguments.pairs)
    result["peak_bytes"] = {arm: bench.peak_bytes(arm) for arm in bench.arms} if device.type == "cuda" else {
        "process": bench.peak_bytes("remit")
    }  # fmt: skip
    peak = flops.peak_flops(device)
    if peak:
        per_token = flops.training_flops_per_token(SHAPES[name]["shape"], None, SHAPES[name]["sequence_length"])
        rate = result["tokens_per_step"] / result["step_seconds"]["ntp"]["median"]
        result["ntp_tokens_per_s"], result["ntp_mfu"] = rate, rate * per_token / peak
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
