"""The loader on NVIDIA DALI: the same samples in the same order, copied to the GPU while the step before computes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from remit_megatron.data.microbatch import Microbatch
from remit_megatron.data.steps import BatchPlan, Sample, Step, stack_arrays
from remit_megatron.errors import UserError


class DaliLoader:
    """One DALI pipeline run a microbatch, fed by an external source that knows the microbatch's number only.

    Without CUDA the pipeline runs on the CPU alone. The source is called in the training loop's thread: what DALI does
    in the background is the transfer.
    """

    def __init__(
        self, sample: Callable[[int], Sample], plan: BatchPlan, *, device: torch.device, prefetch_steps: int = 2
    ) -> None:
        """Raises UserError where DALI is not installed."""
        try:
            from nvidia.dali import fn, types
            from nvidia.dali.pipeline import Pipeline
        except ImportError:
            raise UserError(
                "data.loader = 'dali' needs NVIDIA DALI: pip install 'remit-megatron[dali]', or use loader = 'default'"
            ) from None
        self.plan = plan
        self.device = device
        first = sample(plan.first_sample)
        self.keys = list(first)
        kinds = {"int64": types.INT64, "int32": types.INT32, "float32": types.FLOAT}
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=plan.deal.microbatch_samples,
            num_threads=1,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=prefetch_steps * plan.num_microbatches,
        )

        def microbatch(index: int) -> list[np.ndarray]:
            step, number = divmod(index, plan.num_microbatches)
            if step >= plan.num_steps:
                raise StopIteration
            batch = stack_arrays([sample(n) for n in plan.microbatches(step)[number]])
            return [batch[key] for key in self.keys]

        with self._pipeline:
            outputs = fn.external_source(
                source=microbatch,
                num_outputs=len(self.keys),
                dtype=[kinds[first[key].dtype.name] for key in self.keys],
                ndim=[first[key].ndim for key in self.keys],
                batch=True,
            )
            self._pipeline.set_outputs(*(output.gpu() if on_gpu else output for output in outputs))
        self._pipeline.build()

    def __iter__(self) -> Iterator[Step]:
        for _ in range(self.plan.num_steps):
            start = time.perf_counter()
            batches = [self._next() for _ in range(self.plan.num_microbatches)]
            yield Step(batches, 1e3 * (time.perf_counter() - start))

    def _next(self) -> Microbatch:
        parts = zip(self.keys, self._pipeline.run(), strict=True)
        fields: Any = {key: self._tensor(part) for key, part in parts}
        return Microbatch(**fields)

    def _tensor(self, part: Any) -> torch.Tensor:
        """A copy that DALI will not write to again: its buffers are reused from run to run."""
        if self.device.type == "cuda":
            return torch.from_dlpack(part.as_tensor()).clone()
        return torch.from_numpy(np.array(part.as_array()))

    def close(self) -> None:
        """Drop the pipeline and what it holds ahead."""
        self._pipeline = None
