"""What SLURM wants to know of a job: the section [slurm] of a profile."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from launch.profiles import Line, Section

TIME = re.compile(r"(?:(?P<days>[0-9]{1,9})-)?(?P<fields>[0-9]{1,9}(?::[0-9]{1,9}){0,2})")
ENDLESS = ("UNLIMITED", "INFINITE")


class SlurmSettings(Section):
    """One cluster's partition, limits and ways."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time_limit: Line = "24:00:00"
    """As sbatch's --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    days-hours:minutes:seconds, or UNLIMITED."""
    tasks_per_node: int | None = Field(None, gt=0)
    """Ranks a node; default: its GPUs."""
    cpus_per_task: int | None = Field(None, gt=0)
    memory: Line | None = None
    """Of a node, as sbatch's --mem; "0" is all."""
    exclusive: bool = False
    launcher: Literal["srun", "torchrun"] = "srun"
    """`srun` starts every rank. `torchrun` starts an agent on each node, for sites whose tools expect one."""
    signal_lead_s: int = Field(300, ge=10, le=65535)
    """How long before the time limit ranks are asked to save and stop: twice a step and the slowest save, and a
    minute. SLURM may ask up to a minute earlier."""
    exit_wait_s: int = Field(120, gt=0)
    """How long ranks may outlive the first one that ended."""
    fruitless_restarts: int = Field(2, ge=0)
    """Restarts without a new checkpoint before a job gives up."""
    preflight: bool = True
    """Look at every node before training."""
    preflight_timeout_s: int = Field(60, gt=0)
    """How long a rank may take to start for the preflight, more where its interpreter comes from a slow filesystem; and
    how long each of its checks may take."""
    python: Line | None = None
    """Interpreter that has this program, as the ranks see it; default: the one that launches."""
    modules: tuple[Line, ...] = ()
    """Environment modules that the job script loads."""
    sbatch: tuple[Annotated[str, Field(pattern=r"^--?[^\n\r]+$")], ...] = ()
    """Further options, one each, such as `--constraint=h100`."""
    shared_folders: tuple[str, ...] = ()
    """Folders that all nodes see, though they look local to a node (/tmp, /dev/shm, ...)."""

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if value.upper() not in ENDLESS and not seconds_of(value):
            raise ValueError('is no time limit: write minutes, hours:minutes:seconds or days-hours, such as "24:00:00"')
        return value

    @model_validator(mode="after")
    def _asks_in_time(self) -> Self:
        limit_s = seconds_of(self.time_limit)
        if limit_s and limit_s <= self.signal_lead_s:
            raise ValueError(
                f"time_limit = {self.time_limit!r} is {limit_s} s, and ranks are asked to stop {self.signal_lead_s} s "
                "before it: raise time_limit, or lower signal_lead_s"
            )
        return self


def seconds_of(time_limit: str) -> int | None:
    """Seconds of a time as sbatch reads it; None where it is none."""
    found = TIME.fullmatch(time_limit)
    if not found:
        return None
    parts = [int(part) for part in found["fields"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return (hours * 60 + minutes) * 60 + seconds
