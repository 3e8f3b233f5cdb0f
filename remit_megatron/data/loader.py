"""Feeds a training loop: microbatches of each step, assembled ahead, in an order that follows from the step alone.

Both loaders take the same stateless `sample(n) -> dict of numpy arrays` and give the same microbatches, bit for bit.
The default one assembles steps in a thread and pins them for CUDA; `loader = "dali"` runs them through NVIDIA DALI.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from remit_megatron.data.deal import Deal
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.errors import UserError

Sample = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Which samples this data-parallel rank takes, step by step."""

    first_sample: int
    """Number of the sample with which the first global batch begins; to resume, the samples done."""
    num_steps: int
    num_microbatches: int
    """Of a step, on each data-parallel rank."""
    deal: Deal

    @property
    def step_samples(self) -> int:
        """Samples of a global batch."""
        return self.num_microbatches * self.deal.turn_samples

    def microbatches(self, step: int) -> list[range]:
        """Sample numbers of each microbatch of a step (counted from 0) on this rank."""
        first = self.first_sample + step * self.step_samples
        return [range(first + rows.start, first + rows.stop) for rows in self.deal.microbatches(self.num_microbatches)]


@dataclass(frozen=True, slots=True)
class Step:
    """One step's data."""

    microbatches: list[Microbatch]
    """On the loader's device."""
    wait_ms: float
    """How long the training loop waited for it."""


class Loader(Protocol):
    """Iterates over the steps of a plan once. `close` may be called at any time and more than once."""

    def __iter__(self) -> Iterator[Step]: ...

    def close(self) -> None: ...


def make_loader(
    name: str, sample: Callable[[int], Sample], plan: BatchPlan, *, device: torch.device, prefetch_steps: int = 2
) -> Loader:
    """The loader called `name`: "default" or "dali". Raises UserError for another name or where DALI is missing."""
    if name == "default":
        return ThreadLoader(sample, plan, device=device, prefetch_steps=prefetch_steps)
    if name == "dali":
        from remit_megatron.data.loader_dali import DaliLoader

        return DaliLoader(sample, plan, device=device, prefetch_steps=prefetch_steps)
    raise UserError(f"data.loader = '{name}': known are default, dali")


def stack(samples: list[Sample]) -> Microbatch:
    """Samples to one microbatch, whose fields are their keys. The tensors own their memory."""
    fields: Any = {key: torch.from_numpy(rows) for key, rows in stack_arrays(samples).items()}
    return Microbatch(**fields)


def stack_arrays(samples: list[Sample]) -> dict[str, np.ndarray]:
    """As `stack`, to numpy; a third faster than numpy.stack, which counts at 50 million tokens a second."""
    batch = {}
    for key, first in samples[0].items():
        batch[key] = np.empty((len(samples), *first.shape), dtype=first.dtype)
        for row, sample in enumerate(samples):
            batch[key][row] = sample[key]
    return batch


class ThreadLoader:
    """Assembles steps in one thread, `prefetch_steps` ahead of the training loop."""

    def __init__(
        self, sample: Callable[[int], Sample], plan: BatchPlan, *, device: torch.device, prefetch_steps: int = 2
    ) -> None:
        assert prefetch_steps > 0, "prefetch_steps counts from 1"
        self.sample = sample
        self.plan = plan
        self.device = device
        self._ready: queue.Queue[Any] = queue.Queue(prefetch_steps)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._assemble, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        """Raises in the training loop what `sample` raised in the thread."""
        for _ in range(self.plan.num_steps):
            start = time.perf_counter()
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            if self.device.type == "cuda":
                item = [microbatch.to(self.device) for microbatch in item]
            yield Step(item, 1e3 * (time.perf_counter() - start))

    def close(self) -> None:
        """Stop the thread; steps assembled ahead are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # the thread may wait for room
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue

    def _assemble(self) -> None:
        try:
            for step in range(self.plan.num_steps):
                batches = [stack([self.sample(n) for n in numbers]) for numbers in self.plan.microbatches(step)]
                if self.device.type == "cuda":
                    batches = [microbatch.pin_memory() for microbatch in batches]
                if self._stop.is_set():
                    return
                self._ready.put(batches)
        except BaseException as error:  # noqa: BLE001 - handed to the training loop, which raises it
            self._ready.put(error)
