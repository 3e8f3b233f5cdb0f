"""What this machine's Megatron-Core and its optional companions offer, found by probing."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import multiprocessing
import os
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from remit_megatron.processes import serve_rank


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_hybrid_model() -> bool:
    """Whether Megatron-Core has the HybridModel that takes a pattern of layers; 0.18 and older have another one."""
    if importlib.util.find_spec("megatron.core.models.hybrid") is None:
        return False
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return "hybrid_layer_pattern" in inspect.signature(HybridModel.__init__).parameters


def silence_deprecation() -> None:
    """Keep Megatron-Core 0.19 and newer from telling on every rank, at each model, that GPTModel is deprecated.

    Other words of that module are heard as ever. Idempotent.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_no_deprecation)


def _is_no_deprecation(record: logging.LogRecord) -> bool:
    return "GPTModel IS DEPRECATED" not in str(record.msg)


def own_writer(save: Any) -> dict[str, str]:
    """Arguments of dist_checkpointing.save that choose Megatron-Core's own asynchronous writer where it has another."""
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def keep_results_with_rank() -> None:
    """Start the process that holds the results of Megatron's asynchronous writer so that it ends with this rank.

    Megatron's own start lets it outlive a rank that is killed, with the rank's output open.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", True) is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(serve_rank, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def submodules_of(spec: Any) -> Any:
    """What a part of a layer's spec is made of: it is a ModuleSpec, but from 0.19 on an MLP's is a partial."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def describe_fp8(device_type: str) -> tuple[bool, str]:
    """Whether reference.precision = "fp8" can run on a device ("cpu", "cuda"), and why or why not."""
    if device_type != "cuda":
        return True, "torch's scaled product on the CPU: for tests, not for speed"
    capability = torch.cuda.get_device_capability()
    have = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return False, f"{have}: needs 8.9 or newer"
    return True, f"{have}, torch's scaled product"


def align_optimizer_state(optimizer: Any) -> None:
    """Make the distributed optimizer's checkpoint hold each state under its own parameter.

    Megatron-Core up to 0.19 gathers the buckets of a buffer without the padding between them, then slices the result by
    positions that count the padding: with several buckets (tied embeddings under pipelining, overlapped reduction)
    states are saved shifted, and the last ones as zeros, with a warning at most. The gathered tensors are therefore
    laid out with the padding before they are sliced. Idempotent; does nothing for other optimizers, nor where a newer
    release accounts for the padding itself.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        gather = getattr(part, "get_parameter_state_dp_zero", None)
        if gather is None or "padding_adjustment" in part.sharded_param_state_fully_reshardable.__code__.co_varnames:
            continue
        if not getattr(gather, "is_aligned", False):
            aligned = functools.partial(_gather_aligned, gather, part.buffers)
            aligned.is_aligned = True  # type: ignore[attr-defined]
            part.get_parameter_state_dp_zero = aligned


def make_loadable(optimizer: Any) -> None:
    """Let a distributed optimizer over torch's AdamW be saved before its first update, and loaded. Idempotent.

    Without Apex and Transformer Engine, Megatron-Core 0.16.1 reads the step of states that AdamW makes at its first
    update only, and when loading it expects a step among each parameter's tensors, where the checkpoint keeps one for
    all. The states made here are those that AdamW would make.
    """
    for part in _torch_adam_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    zeros = functools.partial(torch.zeros_like, parameter, memory_format=torch.preserve_format)
                    state = {"step": torch.tensor(0.0), "exp_avg": zeros(), "exp_avg_sq": zeros()}
                    part.optimizer.state[parameter].update(state)
        store = getattr(part, "_set_main_param_and_optimizer_states", None)
        if store is not None and not getattr(store, "adds_step", False):
            loadable = functools.partial(_store_with_step, part, store)
            loadable.adds_step = True  # type: ignore[attr-defined]
            part._set_main_param_and_optimizer_states = loadable


def _torch_adam_parts(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(getattr(part, "optimizer", None), torch.optim.Adam)]


def _store_with_step(part: Any, store: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    store(model_param, {"step": state["step"], **tensors} if "step" in state else tensors)


def separate_steps(optimizer: Any) -> None:
    """Give each parameter's state a step of its own after a load.

    Megatron-Core hands one tensor to all of them, and AdamW counts every state's step up in place: each update would
    count once a parameter, and the bias correction would be wrong from the first resumed step on.
    """
    for part in _torch_adam_parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)


def write_master_weights(chunks: list[Any], optimizer: Any) -> None:
    """Write the optimizer's own weights into the model, as an update does. Collective."""
    sharded = False
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
        sharded = sharded or hasattr(part, "get_parameter_state_dp_zero")
    for chunk in chunks if sharded else []:
        chunk.start_param_sync(force_sync=True)


def _gather_aligned(gather: Any, buffers: list[Any], *args: Any, **kwargs: Any) -> Any:
    state = gather(*args, **kwargs)
    if state is None:  # not the rank that gathers
        return None
    for i, buffer in enumerate(buffers):
        for tensors in state[i].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                if len(tensors[key]) == buffer.numel_unpadded:
                    tensors[key] = _insert_padding(tensors[key], buffer)
    return state


def _insert_padding(compact: Any, buffer: Any) -> Any:
    padded = compact.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = compact[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return padded
