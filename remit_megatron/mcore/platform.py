"""Megatron-Core on a machine without CUDA: the few hard-coded CUDA calls, pointed at the CPU and gloo.

`activate` is called once by an entry point, before anything else of `remit_megatron.mcore` is imported, and decides
for the whole process. On CUDA it changes nothing. On CPU it replaces the calls listed here; arithmetic, schedules,
collectives and checkpoints stay Megatron's own, so a CPU run exercises the same code as a GPU run.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from remit_megatron.device import resolve_device

CPU = torch.device("cpu")
_active: torch.device | None = None


def activate(choice: str, local_rank: int = 0) -> torch.device:
    """Make this process train on `cpu` or `cuda` (or `auto`). Idempotent; a second, different choice is a bug."""
    global _active
    kind = resolve_device(choice, torch.cuda.is_available)
    if _active is not None:
        assert _active.type == kind, f"the process already runs on {_active.type}"
        return _active
    if kind == "cuda":
        _active = torch.device("cuda", local_rank)
        torch.cuda.set_device(_active)
    else:
        _active = CPU
        _redirect_torch()
        _redirect_megatron()
    return _active


def backend(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def _redirect_torch() -> None:
    # DDP buffers, rotary tables, p2p and the checkpoint writer ask for the current device and its streams.
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = lambda *args, **kwargs: _NoStream()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _type_as_cuda
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    _CUDA_TO_CPU.__enter__()


def _redirect_megatron() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random.initialize_rng_tracker = lambda *args, **kwargs: None
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # MLA tests modules against Transformer Engine's classes; without TE those names are no classes.
    mla: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    for name in dir(mla):
        if name.startswith("TE") and not isinstance(getattr(mla, name), type):
            setattr(mla, name, type(name, (), {}))
    mla.HAVE_TE = False
    # A router asks for a function of Transformer Engine, and without it the name is not there at all.
    moe: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe.te_general_gemm = getattr(moe, "te_general_gemm", None)


class _CudaToCpu(TorchFunctionMode):
    """Turns the keyword device="cuda" into "cpu" and drops pin_memory in every torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs = {**kwargs, "device": CPU}
            return func(*args, **kwargs)
        return func(*args)


class _NoStream:
    """Stands for a CUDA stream: every method is a no-op."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


_CUDA_TO_CPU = _CudaToCpu()
_tensor_type = torch.Tensor.type


def _type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The optimizer and the gradient clipping compare type() with names such as torch.cuda.FloatTensor."""
    result = _tensor_type(self, *args, **kwargs)
    if args or kwargs or "cuda" in result:
        return result
    return result.replace("torch.", "torch.cuda.", 1)


class CpuRNGStatesTracker:
    """The interface of Megatron's CudaRNGStatesTracker over the CPU generator."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.states_: dict[str, torch.Tensor] = {}
        self.use_cudagraphable_rng = False
        self.is_inference_rng_tracker = False

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
