"""Cluster profiles: what a cluster wants to know of a job that no recipe says. One strict TOML file each."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import slurm
from remit_megatron import toml
from remit_megatron.errors import UserError

SHIPPED = Path(slurm.__file__).parent / "profiles"
NAME = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET = re.compile(r"(KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
Variable = Annotated[str, Field(pattern=rf"^{NAME}$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Container(Section):
    """A container that pyxis, Docker or podman runs the ranks in."""

    image: Line
    mounts: tuple[Line, ...] = ()
    """`source:target` or `source:target:flags`. The recipe's folders must be among them, under the same path."""
    workdir: Line | None = None
    """Default: the folder in which the launch was commanded, which relative paths in a recipe start from."""


class Environment(Section):
    """Variables of the ranks. Values that a rule of `launch.environment` would choose are chosen there."""

    passed: tuple[Variable, ...] = Field((), alias="pass")
    """Names: the values are taken from the environment at submission and written nowhere. For keys and tokens."""
    set: dict[Variable, Line] = {}
    """Values that the job script says."""


class Profile(Section):
    """One cluster."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time_limit: Line = "24:00:00"
    """As sbatch's --time: minutes, or [days-]hours:minutes:seconds."""
    gpus_per_node: int = Field(0, ge=0)
    """0: ranks on CPUs; how many a node then says --nproc."""
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
    container: Container | None = None
    environment: Environment = Environment()


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a user's own by the path of a .toml file.

    Raises UserError naming the key, and the nearest known one.
    """
    own = "/" in name or name.endswith(".toml")
    path = Path(name) if own else SHIPPED / f"{name}.toml"
    if not own and not path.exists():
        raise UserError(f"--on slurm:{name}: no such profile; shipped: {', '.join(shipped())}; or name a .toml file")
    settings = toml.read(path, "profile")
    try:
        profile = Profile.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"profile {path}: {toml.first_problem(error, Profile)}") from None
    for variable in profile.environment.set:
        if SECRET.search(variable):
            raise UserError(
                f"profile {path}: environment.set.{variable} looks like a secret, and the job script would tell it: "
                f"name it in environment.pass, and set it where you launch"
            )
    return profile


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
