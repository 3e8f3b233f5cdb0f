"""What this machine has, and which optional parts a recipe could use."""

import platform as machine
import sys

import torch

from remit_megatron import __version__
from remit_megatron.mcore import compat
from remit_megatron.ops.implementation import describe_implementation
from remit_megatron.optional import importable

OPTIONAL = {
    "transformer-engine": ("transformer_engine.pytorch", "model.implementation = 'transformer_engine'"),
    "apex": ("apex.optimizers", "fused optimizer and gradient norms inside Megatron"),
    "triton": ("triton", "compute.loss_implementation = 'triton'"),
    "nvidia-dali-cuda120": ("nvidia.dali", "the DALI loader"),
    "wandb": ("wandb", "logging.wandb"),
    "lm-eval": ("lm_eval", "remit benchmark"),
    "tensorboard": ("torch.utils.tensorboard", "logging.tensorboard"),
}


def report() -> str:
    """A table as text: versions, devices, optional parts with what each is for."""
    lines = [
        f"remit-megatron {__version__}",
        f"python         {sys.version.split()[0]} on {machine.system()} {machine.machine()}",
        f"torch          {torch.__version__}",
        f"megatron-core  {compat.version('megatron-core') or 'missing: pip install megatron-core'}",
        *_devices(),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = describe_implementation(device)
    lines.append(f"token NLL      {name} ({reason})")
    able, reason = compat.describe_fp8(device)
    lines.append(f"fp8 reference  {'usable' if able else 'not usable'} ({reason})")
    for distribution, (module, purpose) in OPTIONAL.items():
        lines.append(f"{distribution:20s}{_state(distribution, module):28s}{purpose}")
    return "\n".join(lines)


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return [f"device         cpu, {torch.get_num_threads()} threads, gloo; no CUDA device"]
    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"device         cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}, nccl"
        )
    return lines


def _state(distribution: str, module: str) -> str:
    if importable(module):
        return f"usable {compat.version(distribution) or ''}".rstrip()
    return "installed, does not import" if compat.version(distribution) else "not installed"
