"""The job script: the template of slurm/ with a header and settings filled in, otherwise as a user would submit it."""

import re
import shlex
from pathlib import Path

import slurm
from launch.backends.base import Launch
from launch.backends.slurm.settings import SlurmSettings
from launch.profiles import Profile
from remit_megatron.errors import UserError

TEMPLATES = Path(slurm.__file__).parent
MODULE_COMMAND = (
    'type module > /dev/null 2>&1 || . "${LMOD_PKG:-${MODULESHOME:-/usr/share/modules}}/init/bash" || '
    'REMIT_START_FAILURE="modules of the profile: this node has no command module"'
)
"""A job's shell is none that a login would set up: where the submitter's function has not come with it, it is made."""


def tasks_per_node(profile: Profile, settings: SlurmSettings, nproc: int | None) -> int:
    """Ranks a node. Raises UserError where nothing says, or two things differ."""
    known = settings.tasks_per_node or profile.gpus_per_node
    if known and nproc and known != nproc:
        raise UserError(
            f"--nproc {nproc}: the profile has {known} ranks a node: leave --nproc out, or change the profile"
        )
    if not known and not nproc:
        raise UserError("--nproc is missing: the profile has neither gpus_per_node nor slurm.tasks_per_node")
    return known or nproc or 1


def check_paths(*paths: Path) -> None:
    """Raise UserError for a path that sbatch cannot read."""
    for path in paths:
        if re.search(r'["\\]', str(path)):
            raise UserError(f"{path}: sbatch reads no path with a double quote or a backslash: use another folder")


def check_mounts(profile: Profile) -> None:
    """Raise UserError for a mount that pyxis, which gets them joined by commas, would take for two."""
    for mount in profile.container.mounts if profile.container else ():
        if "," in mount:
            raise UserError(
                f"container.mounts of the profile: {mount!r} has a comma, at which pyxis cuts: name one mount in each "
                "entry, join flags with +, and mount a folder with a comma in its name by a folder above it"
            )


def header(profile: Profile, settings: SlurmSettings, launch: Launch, tasks: int) -> list[str]:
    """The options of sbatch, one each."""
    options = [f"--job-name=remit-{re.sub(r'[^A-Za-z0-9_.-]', '-', launch.run.name)}", f"--nodes={launch.nodes}"]
    options.append(f"--ntasks-per-node={tasks}")
    if profile.gpus_per_node:
        options.append(f"--gpus-per-node={profile.gpus_per_node}")
    for option, value in (
        ("cpus-per-task", settings.cpus_per_task),
        ("mem", settings.memory),
        ("partition", settings.partition),
        ("account", settings.account),
        ("qos", settings.qos),
        ("time", settings.time_limit),
    ):
        if value is not None:
            options.append(f"--{option}={value}")
    if settings.exclusive:
        options.append("--exclusive")
    options += ["--requeue", "--open-mode=append", f"--signal=B:USR1@{settings.signal_lead_s}"]
    options += [f"--chdir={launch.workdir}", f"--output={str(launch.run).replace('%', '%%')}/logs/%j.log"]
    return [*options, *settings.sbatch]


def values(profile: Profile, settings: SlurmSettings, launch: Launch, python: str) -> dict[str, str]:
    """What the template reads from its environment, and the profile's own variables. python: where it names none."""
    ours = {
        "REMIT_RECIPE": str(launch.run / "recipe.toml"),
        "REMIT_RUN": str(launch.run),
        "REMIT_PYTHON": settings.python or python,
        "REMIT_LAUNCHER": settings.launcher,
        "REMIT_PREFLIGHT": str(int(settings.preflight)),
        "REMIT_PREFLIGHT_TIMEOUT_S": str(settings.preflight_timeout_s),
        "REMIT_EXIT_WAIT_S": str(settings.exit_wait_s),
        "REMIT_FRUITLESS_RESTARTS": str(settings.fruitless_restarts),
    }
    if launch.arguments:
        ours["REMIT_ARGS"] = " ".join(launch.arguments)
    container = profile.container
    if container:
        ours["REMIT_CONTAINER_IMAGE"] = container.image
        ours["REMIT_CONTAINER_MOUNTS"] = ",".join(container.mounts)
        ours["REMIT_CONTAINER_WORKDIR"] = container.workdir or str(launch.workdir)
        ours["REMIT_CONTAINER_ENV"] = ",".join((*profile.environment.passed, *profile.environment.set))
    return {**ours, **profile.environment.set}


def render(template: str, options: list[str], values: dict[str, str], modules: tuple[str, ...] = ()) -> str:
    """The template's text with its #SBATCH lines replaced by `options`, and `values` exported right after them.

    The first module that cannot be loaded is left to the template to tell: it knows how to write an event.
    """
    lines = (TEMPLATES / template).read_text(encoding="utf-8").splitlines()
    marked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first, last = marked[0], marked[-1]
    filled = [f"#SBATCH {_quoted(option)}" for option in options]
    filled += ["", *(f"export {name}={shlex.quote(value)}" for name, value in values.items())]
    if modules:
        filled.append(MODULE_COMMAND)
    for module in modules:
        failure = shlex.quote(f"modules of the profile: {module} cannot be loaded")
        load = f"module load {shlex.quote(module)} || REMIT_START_FAILURE={failure}"
        filled.append(f"[[ -n ${{REMIT_START_FAILURE:-}} ]] || {load}")
    return "\n".join([*lines[:first], *filled, *lines[last + 1 :]]) + "\n"


def _quoted(option: str) -> str:
    """sbatch splits its lines at blanks, and understands quotes and comments."""
    return f'"{option}"' if re.search(r"[\s'#]", option) else option
