"""The job script: the template of slurm/ with a header and settings filled in, otherwise as a user would submit it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import slurm
from launch.profiles import Profile
from remit_megatron.errors import UserError

TEMPLATES = Path(slurm.__file__).parent
MODULE_COMMAND = (
    'type module > /dev/null 2>&1 || . "${LMOD_PKG:-${MODULESHOME:-/usr/share/modules}}/init/bash" || '
    'REMIT_START_FAILURE="modules of the profile: this node has no command module"'
)
"""A job's shell is none that a login would set up: where the submitter's function has not come with it, it is made."""


def tasks_per_node(profile: Profile, nproc: int | None) -> int:
    """Ranks a node. Raises UserError where nothing says, or two things differ."""
    known = profile.tasks_per_node or profile.gpus_per_node
    if known and nproc and known != nproc:
        raise UserError(
            f"--nproc {nproc}: the profile has {known} ranks a node: leave --nproc out, or change the profile"
        )
    if not known and not nproc:
        raise UserError("--nproc is missing: the profile has neither gpus_per_node nor tasks_per_node")
    return known or nproc or 1


def header(profile: Profile, run: Path, name: str, nodes: int, tasks: int, workdir: Path) -> list[str]:
    """The options of sbatch, one each. Raises UserError for a path that sbatch cannot read."""
    for path in (run, workdir):
        if re.search(r'["\\]', str(path)):
            raise UserError(f"{path}: sbatch reads no path with a double quote or a backslash: use another folder")
    options = [f"--job-name=remit-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}", f"--nodes={nodes}"]
    options.append(f"--ntasks-per-node={tasks}")
    if profile.gpus_per_node:
        options.append(f"--gpus-per-node={profile.gpus_per_node}")
    for option, value in (
        ("cpus-per-task", profile.cpus_per_task),
        ("mem", profile.memory),
        ("partition", profile.partition),
        ("account", profile.account),
        ("qos", profile.qos),
        ("time", profile.time_limit),
    ):
        if value is not None:
            options.append(f"--{option}={value}")
    if profile.exclusive:
        options.append("--exclusive")
    options += ["--requeue", "--open-mode=append", f"--signal=B:USR1@{profile.signal_lead_s}"]
    options += [f"--chdir={workdir}", f"--output={str(run).replace('%', '%%')}/logs/%j.log"]
    return [*options, *profile.sbatch]


def settings(profile: Profile, run: Path, python: str, workdir: Path, arguments: Sequence[str] = ()) -> dict[str, str]:
    """What the template reads from its environment, and the profile's own variables. arguments: of `remit train`."""
    values = {
        "REMIT_RECIPE": str(run / "recipe.toml"),
        "REMIT_RUN": str(run),
        "REMIT_PYTHON": profile.python or python,
        "REMIT_LAUNCHER": profile.launcher,
        "REMIT_PREFLIGHT": str(int(profile.preflight)),
        "REMIT_PREFLIGHT_TIMEOUT_S": str(profile.preflight_timeout_s),
        "REMIT_EXIT_WAIT_S": str(profile.exit_wait_s),
        "REMIT_FRUITLESS_RESTARTS": str(profile.fruitless_restarts),
    }
    if arguments:
        values["REMIT_ARGS"] = " ".join(arguments)
    container = profile.container
    if container:
        values["REMIT_CONTAINER_IMAGE"] = container.image
        values["REMIT_CONTAINER_MOUNTS"] = ",".join(container.mounts)
        values["REMIT_CONTAINER_WORKDIR"] = container.workdir or str(workdir)
        values["REMIT_CONTAINER_ENV"] = ",".join((*profile.environment.passed, *profile.environment.set))
    return {**values, **profile.environment.set}


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
