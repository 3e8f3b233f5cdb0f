"""Runs a script of Megatron-LM on CPU ranks, to try flags and data on a machine without a GPU. For 0.16.

    torchrun --nproc-per-node N on_cpu.py SCRIPT FLAGS --distributed-backend gloo

`platform.activate` points Megatron-Core's CUDA calls at the CPU; what is here does so for what `megatron.training` asks
of CUDA besides. The arithmetic stays Megatron's.
"""

import contextlib
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch

from remit_megatron.mcore import platform


class _NoStream:
    """Stands for a stream or an event."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def redirect() -> None:
    """For the whole process; before anything of Megatron-LM is imported."""
    platform.activate("cpu", int(os.environ.get("LOCAL_RANK", "0")))
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True  # asked before anything else: "Megatron requires CUDA."
    cuda.device_count = lambda: 1  # groups and seeds are set up where there is one
    cuda.set_device = cuda.empty_cache = _nothing
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.default_stream = _NoStream
    described = types.SimpleNamespace(major=9, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1)
    cuda.get_device_properties = lambda *args, **kwargs: described
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.get_device_name = lambda *args, **kwargs: "cpu"
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _zero)
    cuda.device_memory_used = _zero

    import megatron.core.datasets.utils as datasets
    import megatron.legacy.fused_kernels as kernels
    import megatron.training.initialize as initialize

    # The wheel of Megatron-Core has these compiled, and no Makefile; kernels for CUDA are not compiled at all.
    compiled: Any = datasets
    compiled.compile_helpers = kernels.load = initialize._warmup_jit_function = _nothing

    from megatron.core.model_parallel_config import ModelParallelConfig

    complete = ModelParallelConfig.__post_init__

    def keep_outputs(config: Any) -> None:
        complete(config)
        config.deallocate_pipeline_outputs = False  # on gloo a freed output races with the send that still reads it

    parallel: Any = ModelParallelConfig
    parallel.__post_init__ = keep_outputs


if __name__ == "__main__":
    script = sys.argv[1]
    sys.argv[:] = sys.argv[1:]
    # Of Megatron-LM's checkout `megatron.training` is wanted, and not its copy of megatron.core, which is not compiled.
    here = str(Path(script).resolve().parent)
    sys.path = sorted([here, *sys.path[1:]], key=lambda folder: (Path(folder) / "megatron/training").is_dir())
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM insists on it
    redirect()
    runpy.run_path(script, run_name="__main__")
