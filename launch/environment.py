"""Environment variables of a rank, chosen by rule from the layout and the hardware.

A variable that is set already stays as it is. The table below is the documentation: docs/clusters.md shows it.
"""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from remit_megatron.config import Parallel

BLACKWELL = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rules look at."""

    parallel: Parallel
    nodes: int = 1
    compute_capability: float | None = None
    """Of the GPUs, such as 9.0; None: ranks on CPUs."""

    @property
    def cuda(self) -> bool:
        return self.compute_capability is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One variable: its value where `applies`."""

    name: str
    value: str
    when: str
    why: str
    applies: Callable[[Facts], bool]


RULES = (
    Rule(
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        value="1",
        when="compute capability below 10 (Ampere, Hopper), and tensor or context parallel",
        why="kernels then start in the order in which they were issued, so that a collective that was issued before a "
        "multiplication overlaps it; Megatron-Core relies on it",
        applies=lambda f: (
            f.compute_capability is not None
            and f.compute_capability < BLACKWELL
            and (f.parallel.tensor > 1 or f.parallel.context > 1)
        ),
    ),
    Rule(
        name="TORCH_NCCL_ASYNC_ERROR_HANDLING",
        value="1",
        when="CUDA",
        why="a collective that times out ends its rank, in place of a silent wait",
        applies=lambda f: f.cuda,
    ),
    Rule(
        name="TORCH_FR_BUFFER_SIZE",
        value="2000",
        when="CUDA",
        why="NCCL's flight recorder keeps the last 2,000 collectives",
        applies=lambda f: f.cuda,
    ),
    Rule(
        name="TORCH_NCCL_DUMP_ON_TIMEOUT",
        value="1",
        when="CUDA",
        why="and writes them to a file when one times out",
        applies=lambda f: f.cuda,
    ),
    Rule(
        name="NCCL_DEBUG",
        value="WARN",
        when="CUDA",
        why="NCCL says what it failed at, and nothing else",
        applies=lambda f: f.cuda,
    ),
    Rule(
        name="NCCL_IB_TIMEOUT",
        value="22",
        when="CUDA, several nodes",
        why="17 s, so that a port that flaps does not end the run; NCCL's default is 4 s at 20",
        applies=lambda f: f.cuda and f.nodes > 1,
    ),
    Rule(
        name="PYTORCH_CUDA_ALLOC_CONF",
        value="expandable_segments:True",
        when="CUDA",
        why="less fragmentation where sizes vary: the reference's and the student's passes alternate",
        applies=lambda f: f.cuda,
    ),
    Rule(
        name="OMP_NUM_THREADS",
        value="1",
        when="always",
        why="as many ranks share a node's cores; compute.threads decides for ranks on CPUs",
        applies=lambda f: True,
    ),
)


def chosen(facts: Facts, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to `environment`."""
    return {rule.name: rule.value for rule in RULES if rule.name not in environment and rule.applies(facts)}


def contradictions(facts: Facts, environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is set to something else than its rule says."""
    return [
        f"{rule.name} = {environment[rule.name]} is set; for {rule.when} it should be {rule.value}: {rule.why}"
        for rule in RULES
        if rule.name == "CUDA_DEVICE_MAX_CONNECTIONS"
        and rule.applies(facts)
        and environment.get(rule.name, rule.value) != rule.value
    ]


@lru_cache(maxsize=1)
def compute_capability() -> float | None:
    """Lowest of this machine's GPUs, asked of nvidia-smi: a question to CUDA would fix its settings. None: no GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = [float(line) for line in result.stdout.split() if line.replace(".", "", 1).isdigit()]
    return min(found) if result.returncode == 0 and found else None
