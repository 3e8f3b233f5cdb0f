"""Both loaders give the samples that the plan names, bit for bit, in its order."""

import importlib.util
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from remit_megatron.data.deal import Deal
from remit_megatron.data.loader import make_loader
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.data.steps import BatchPlan, Step
from remit_megatron.errors import UserError

LENGTH = 33
CPU = torch.device("cpu")
LOADERS = [
    "default",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
            reason="NVIDIA DALI is not installed (nvidia-dali-cuda120)",
        ),
    ),
]


def sample(n: int) -> dict[str, np.ndarray]:
    """What training takes: ids, a float mask, a scalar; all a function of n."""
    generator = np.random.default_rng(n)
    return {
        "tokens": generator.integers(0, 50_000, LENGTH),
        "labels": generator.integers(0, 50_000, LENGTH),
        "loss_mask": generator.random(LENGTH).astype(np.float32),
        "sample_id": np.array(n << 40, dtype=np.int64),
    }


def tensor(microbatch: Microbatch, key: str) -> torch.Tensor:
    """The field that a key of `sample` becomes."""
    return getattr(microbatch, key)


def load(name: str, plan: BatchPlan, device: torch.device = CPU, make: Callable[[int], dict] = sample) -> list[Step]:
    loader = make_loader(name, make, plan, device=device)
    try:
        return list(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(("microbatches", "size"), [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
def test_tensors(name: str, microbatches: int, size: int, rank: int, ranks: int) -> None:
    deal = Deal(microbatch_samples=size, dp_rank=rank, dp_size=ranks)
    plan = BatchPlan(first_sample=7, num_steps=4, num_microbatches=microbatches, deal=deal)
    steps = load(name, plan)
    assert len(steps) == 4
    for number, step in enumerate(steps):
        assert step.wait_ms >= 0
        assert len(step.microbatches) == microbatches
        for i, batch in enumerate(step.microbatches):
            first = 7 + number * microbatches * size * ranks + (i * ranks + rank) * size
            for row in range(size):
                for key, value in sample(first + row).items():
                    found = tensor(batch, key)
                    assert found.shape == (size, *value.shape)
                    assert found.numpy().dtype == value.dtype
                    assert np.array_equal(found[row].numpy(), value)


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_cover_every_sample_once_and_resume_is_one_integer(name: str) -> None:
    def ids(first: int, steps: int, rank: int) -> list[int]:
        deal = Deal(microbatch_samples=2, dp_rank=rank, dp_size=2)
        plan = BatchPlan(first_sample=first, num_steps=steps, num_microbatches=2, deal=deal)
        return [int(n) >> 40 for s in load(name, plan) for batch in s.microbatches for n in tensor(batch, "sample_id")]

    whole = [ids(0, 5, rank) for rank in (0, 1)]
    assert sorted(whole[0] + whole[1]) == list(range(40))
    assert [ids(24, 2, rank) for rank in (0, 1)] == [part[12:] for part in whole]


@pytest.mark.parametrize("name", LOADERS)
def test_tensors_own_their_memory(name: str) -> None:
    """A later step must not write into an earlier one's tensors, nor into what `sample` keeps."""
    kept = {n: sample(n) for n in range(12)}
    plan = BatchPlan(first_sample=0, num_steps=6, num_microbatches=1, deal=Deal(microbatch_samples=2))
    steps = load(name, plan, make=kept.__getitem__)
    for step in steps[:3]:
        step.microbatches[0].tokens.fill_(-1)
    for n in range(12):
        assert np.array_equal(kept[n]["tokens"], sample(n)["tokens"])
    for n in range(6, 12):
        assert steps[n // 2].microbatches[0].tokens[n % 2].tolist() == sample(n)["tokens"].tolist()


def test_prefetch_hides_the_work() -> None:
    """A loop that computes longer than a step takes to assemble hardly waits; one that does not, waits for it."""

    def slow(n: int) -> dict[str, np.ndarray]:
        time.sleep(0.02)
        return sample(n)

    plan = BatchPlan(first_sample=0, num_steps=6, num_microbatches=1, deal=Deal(microbatch_samples=1))
    waits: dict[float, list[float]] = {}
    for compute_s in (0.0, 0.06):
        loader = make_loader("default", slow, plan, device=CPU)
        waits[compute_s] = []
        for step in loader:
            waits[compute_s].append(step.wait_ms)
            time.sleep(compute_s)
        loader.close()
    assert np.median(waits[0.0][1:]) > 10
    assert np.median(waits[0.06][1:]) < np.median(waits[0.0][1:]) / 2


@pytest.mark.parametrize("name", LOADERS)
def test_errors_reach_the_training_loop(name: str) -> None:
    def fails(n: int) -> dict[str, np.ndarray]:
        if n == 5:
            raise ValueError("sample 5 is broken")
        return sample(n)

    plan = BatchPlan(first_sample=0, num_steps=9, num_microbatches=1, deal=Deal(microbatch_samples=1))
    loader = make_loader(name, fails, plan, device=CPU)
    seen: list[Step] = []
    with pytest.raises((ValueError, RuntimeError), match="sample 5 is broken"):
        seen.extend(loader)
    loader.close()


def test_close_ends_the_thread_early() -> None:
    import threading

    plan = BatchPlan(first_sample=0, num_steps=10**9, num_microbatches=1, deal=Deal(microbatch_samples=1))
    loader = make_loader("default", sample, plan, device=CPU)
    next(iter(loader))
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_unknown_loader() -> None:
    with pytest.raises(UserError, match=r"data.loader = 'x': known are default, dali"):
        make_loader(
            "x",
            sample,
            BatchPlan(first_sample=0, num_steps=1, num_microbatches=1, deal=Deal(microbatch_samples=1)),
            device=CPU,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", LOADERS)
def test_cuda(name: str) -> None:
    plan = BatchPlan(first_sample=0, num_steps=8, num_microbatches=2, deal=Deal(microbatch_samples=3))
    for cpu, gpu in zip(load("default", plan), load(name, plan, torch.device("cuda", 0)), strict=True):
        for left, right in zip(cpu.microbatches, gpu.microbatches, strict=True):
            for key in sample(0):
                assert tensor(right, key).is_cuda
                assert torch.equal(tensor(left, key), tensor(right, key).cpu())
