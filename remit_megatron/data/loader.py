"""Feeds a training loop: microbatches of each step, assembled ahead, in an order that follows from the step alone.

Both loaders take the same stateless `sample(n) -> dict of numpy arrays` and give the same microbatches, bit for bit.
The default one assembles steps in a thread and pins them for CUDA; `loader = "dali"` runs them through NVIDIA DALI.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from remit_megatron.data.steps import BatchPlan, Loader, Sample, Step, stack
from remit_megatron.errors import UserError


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
