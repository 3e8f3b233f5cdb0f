"""Cluster profiles: what a cluster wants to know of a job that no recipe says. One strict TOML file each.

What every back end reads is here; a section named like a back end holds what that one alone reads, and
`launch/backends/` documents it.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

import slurm
from remit_megatron import toml
from remit_megatron.errors import UserError

SHIPPED = Path(slurm.__file__).parent / "profiles"
NAME = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET = re.compile(r"(KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
OURS = re.compile(
    r"REMIT_(RECIPE|RUN|PYTHON|LAUNCHER|PREFLIGHT\w*|EXIT_WAIT_S|FRUITLESS_RESTARTS|ARGS|CHAIN|START_FAILURE|LOGS"
    r"|NODES|SCORES|CONTAINER_\w+|WHEEL|STAGE|JOBS|TEMPLATES|OVERRIDES)"
    r"|(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|SLURM_(JOB_\w+|JOBID|PROCID|LOCALID|NODEID|NNODES|NODELIST|NTASKS\w*|TASKS_PER_NODE|CPUS_PER_TASK|ARRAY_\w+"
    r"|RESTART_COUNT)"
)
"""Variables by which a job script tells its ranks what to run, where and as which rank: set by nobody else."""
FLAT = "slurm"
"""The section whose keys stood at the top of a profile while there were no sections."""
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
    """One cluster, as far as every back end asks."""

    gpus_per_node: int = Field(0, ge=0)
    """0: ranks on CPUs; how many a node then says --nproc."""
    container: Container | None = None
    environment: Environment = Environment()


def load_profile(name: str, sections: Mapping[str, type[Section]]) -> tuple[Profile, dict[str, Section]]:
    """A shipped profile by name, or a user's own by the path of a .toml file: the common part, and every section.

    sections: by the name of the back end that reads it. Raises UserError naming the key, and the nearest known one.
    """
    own = "/" in name or name.endswith(".toml")
    path = Path(name) if own else SHIPPED / f"{name}.toml"
    if not own and not path.exists():
        raise UserError(f"profile {name}: no such profile; shipped: {', '.join(shipped())}; or name a .toml file")
    fields: dict[str, Any] = {section: (model, model()) for section, model in sections.items()}
    whole = create_model("WholeProfile", __base__=Profile, **fields)
    settings, moved = _sectioned(toml.read(path, "profile"), path)
    try:
        read = whole.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"profile {path}: {toml.first_problem(error, whole)}") from None
    _check_variables(read.environment, path)
    if moved:
        print(f"remit: profile {path}: write {', '.join(moved)} under a line [{FLAT}]", file=sys.stderr, flush=True)
    profile = Profile.model_validate({name: getattr(read, name) for name in Profile.model_fields})
    return profile, {section: getattr(read, section) for section in sections}


def _sectioned(settings: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings with the keys that stand at the top, but belong to the section FLAT, in it; and which these are."""
    section = settings.get(FLAT, {})
    moved = [key for key, value in settings.items() if key not in Profile.model_fields and not isinstance(value, dict)]
    if not isinstance(section, dict):
        return settings, []
    if both := [key for key in moved if key in section]:
        raise UserError(f"profile {path}: {both[0]} stands at the top and in [{FLAT}]: remove it at the top")
    kept = {key: value for key, value in settings.items() if key not in moved}
    return {**kept, FLAT: {**section, **{key: settings[key] for key in moved}}}, moved


def _check_variables(environment: Environment, path: Path) -> None:
    for where, names in (("pass", environment.passed), ("set", tuple(environment.set))):
        for variable in names:
            if OURS.fullmatch(variable):
                raise UserError(
                    f"profile {path}: environment.{where} has {variable}, by which ranks are told what to run and "
                    "which of them they are: remove it there"
                )
    for variable in environment.set:
        if SECRET.search(variable):
            raise UserError(
                f"profile {path}: environment.set.{variable} looks like a secret, and the job script would tell it: "
                f"name it in environment.pass, and set it where you launch"
            )


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
