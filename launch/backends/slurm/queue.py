"""What SLURM is asked: whether it would take a job, to take it, and whether it still has it."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.backends.slurm.script import TEMPLATES
from remit_megatron.errors import RunError, UserError

NO_ANSWER = ("a configuration source", "process configuration file", "contact slurm controller")
"""What sbatch says where no controller is within reach."""
ANSWER_S = 30
"""How long a question waits for its answer: a controller that is busy may take its time."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
"""States of a job that has no nodes."""
KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ"),
    *("MODULEPATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SLURM_CONF"),
)
"""Of the submitter's environment, besides sbatch's own variables and the profile's: enough for a shell, no secret."""
KEPT_FOR_MODULES = re.compile(
    r"BASH_ENV|BASH_FUNC_(_?module\w*|ml)%%|(__)?(MODULE|LMOD)\w*|LOADEDMODULES|_LMFILES_|_ModuleTable\w*"
)
"""And what the command `module` is made of, where the profile has modules."""


def kept(variables: Mapping[str, str], *, modules: bool) -> dict[str, str]:
    """What of the submitter's environment reaches a job."""

    def wanted(name: str) -> bool:
        return name in KEPT or name.startswith("SBATCH_") or bool(modules and KEPT_FOR_MODULES.fullmatch(name))

    return {name: value for name, value in variables.items() if wanted(name)}


def test_only(script: str, variables: Mapping[str, str]) -> None:
    """Ask SLURM whether it would take the script; its answer goes to stderr.

    Raises UserError where it would not, RunError where nobody answers. Without sbatch that is said, and no more.
    """
    try:
        # Everything that the environment gives reaches the job: of the submitter's, KEPT and what the profile names.
        result = subprocess.run(
            ["sbatch", "--test-only", "--export=ALL"], input=script, text=True, env=variables, capture_output=True
        )
    except FileNotFoundError:
        print("sbatch is not on this machine: SLURM has not been asked", file=sys.stderr)
        return
    print(_trimmed(result.stderr), file=sys.stderr)
    if result.returncode and any(words in result.stderr for words in NO_ANSWER):
        raise RunError("SLURM's controller is out of reach, so it has not judged the job: dry-run on a login node")
    if result.returncode:
        raise UserError("SLURM would refuse this job: change --nodes, --nproc or the profile")


def submit(job_script: Path, links: int, variables: Mapping[str, str]) -> list[str]:
    """Submit one job, or a chain of several; the job ids. Raises UserError where sbatch is missing or says no."""
    command = ["sbatch", "--parsable", "--export=ALL", str(job_script)]
    if links > 1:
        command = ["bash", str(TEMPLATES / "chain.sh"), str(links), "--export=ALL", str(job_script)]
    try:
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is not on this machine: launch from a login node, or --dry-run") from None
    if result.returncode:
        raise UserError(f"SLURM refuses {job_script}: {_trimmed(result.stderr)}")
    jobs = [line.partition(";")[0] for line in result.stdout.split()]
    if not jobs:
        raise RunError(f"sbatch named no job: {_trimmed(result.stderr)}")
    return jobs


def states(jobs: Sequence[str]) -> list[str] | None:
    """States of those of the jobs that SLURM has not done with; None where it does not answer."""
    if not jobs:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%T"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # An id that SLURM has forgotten makes it fail; a controller that does not answer, too, and that is not the end.
    if result.returncode and "Invalid job id" not in result.stderr:
        return result.stdout.split() or None
    return result.stdout.split()


def _trimmed(text: str) -> str:
    return " ".join(text.split())
