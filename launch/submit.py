"""`remit launch`: one recipe on this machine, in a container, or on a SLURM cluster."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import environment, render, run_folder
from launch.docker import docker_command
from launch.follow import follow
from launch.profiles import Profile, load_profile
from remit_megatron.config import Recipe, load_recipe
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import RunError, UserError

NO_ANSWER = ("a configuration source", "process configuration file", "contact slurm controller")
"""What sbatch says where no controller is within reach."""
KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ"),
    *("MODULEPATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SLURM_CONF"),
)
"""Of the submitter's environment, besides sbatch's own variables and the profile's: enough for a shell, no secret."""
KEPT_FOR_MODULES = re.compile(
    r"BASH_ENV|BASH_FUNC_(_?module\w*|ml)%%|(__)?(MODULE|LMOD)\w*|LOADEDMODULES|_LMFILES_|_ModuleTable\w*"
)
"""And what the command `module` is made of, where the profile has modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line says."""

    recipe: str
    overrides: tuple[str, ...] = ()
    target: str = "local"
    """local, docker[:PROFILE] or slurm[:PROFILE]"""
    nodes: int = 1
    nproc: int | None = None
    """Ranks a node."""
    chain: int = 1
    dry_run: bool = False
    follow: bool = False
    fallback: bool = False
    """Of `remit train`."""

    @property
    def arguments(self) -> list[str]:
        """More arguments of `remit train`."""
        return ["--fallback"] if self.fallback else []


def launch(request: Request) -> int:
    """Launch a run; returns the exit code. Raises UserError before anything is written, RunError if SLURM refuses."""
    kind, _, name = request.target.partition(":")
    if kind not in ("local", "docker", "slurm") or (kind == "local" and name):
        raise UserError(f"--on {request.target}: say local, docker, docker:PROFILE, slurm or slurm:PROFILE")
    if kind != "slurm":
        flags = {"--nodes": request.nodes > 1, "--chain": request.chain > 1, "--follow": request.follow}
        if any(flags.values()):
            raise UserError(f"{next(flag for flag, given in flags.items() if given)} goes with --on slurm")
    recipe = load_recipe(request.recipe, request.overrides)
    run = Path(recipe.run).resolve()
    run_folder.check_free(run, recipe)
    if kind == "local":
        return _local(request, recipe, run)
    if kind == "docker":
        return _docker(request, recipe, run, load_profile(name) if name else Profile())
    return _slurm(request, recipe, run, load_profile(name or "gpu"))


def _train(run: Path, arguments: Sequence[str]) -> list[str]:
    # Bare, for an absolute path is no TOML value, and then it is taken as it is.
    return ["train", str(run / "recipe.toml"), "--set", f"run={run}", *arguments]


def _local(request: Request, recipe: Recipe, run: Path) -> int:
    command = [sys.executable, "-m", "remit_megatron.cli", *_train(run, request.arguments)]
    capability = None if recipe.compute.device == "cpu" else environment.compute_capability()
    facts = environment.Facts(parallel=recipe.parallel, compute_capability=capability)
    added = environment.chosen(facts, os.environ)
    nproc = request.nproc or 1
    if request.dry_run:
        print(" ".join(f"{name}={value}" for name, value in added.items()), shlex.join(command), f"--nproc {nproc}")
        return 0
    _say(run_folder.prepare(run, recipe))
    from launch.local import run_local

    os.environ.update(added)
    return run_local(command, nproc, listens=True)


def _docker(request: Request, recipe: Recipe, run: Path, profile: Profile) -> int:
    secrets = passed_values(profile)
    command = docker_command(_train(run, request.arguments), run, profile, request.nproc or profile.gpus_per_node or 1)
    if request.dry_run:
        print(shlex.join(command))
        return 0
    _say(run_folder.prepare(run, recipe))
    from launch.local import run_client

    return run_client(command, {**os.environ, **secrets})


def _slurm(request: Request, recipe: Recipe, run: Path, profile: Profile) -> int:
    workdir = Path.cwd()
    tasks = render.tasks_per_node(profile, request.nproc)
    run_folder.check_shared(run, request.nodes, profile.shared_folders)
    secrets = passed_values(profile)
    options = render.header(profile, run, run.name, request.nodes, tasks, workdir)
    values = render.settings(profile, run, sys.executable, workdir, request.arguments)
    script = render.render("train.sbatch", options, values, profile.modules)
    submit_environment = {**kept(os.environ, modules=bool(profile.modules)), **secrets}
    if request.dry_run:
        print(script, end="")
        return _test_only(script, submit_environment)
    remarks = run_folder.prepare(run, recipe)
    job_script = run / "job.sbatch"
    write_atomically(job_script, script.encode())
    _say(remarks)
    jobs = _submit(job_script, request.chain, submit_environment)
    print(f"{run}: job {', '.join(jobs)} submitted; remit status {shlex.quote(str(run))}")
    return follow(run, jobs) if request.follow else 0


def kept(variables: Mapping[str, str], *, modules: bool) -> dict[str, str]:
    """What of the submitter's environment reaches a job."""

    def wanted(name: str) -> bool:
        return name in KEPT or name.startswith("SBATCH_") or bool(modules and KEPT_FOR_MODULES.fullmatch(name))

    return {name: value for name, value in variables.items() if wanted(name)}


def passed_values(profile: Profile) -> dict[str, str]:
    """The variables that a profile takes from this environment. Raises UserError for one that is not set."""
    for name in profile.environment.passed:
        if name not in os.environ:
            raise UserError(
                f"environment.pass of the profile names {name}, which is not set: set it, or remove it there"
            )
    return {name: os.environ[name] for name in profile.environment.passed}


def _test_only(script: str, variables: dict[str, str]) -> int:
    """Ask SLURM whether it would take the script; its answer goes to stderr."""
    try:
        # Everything that the environment gives reaches the job: of the submitter's, KEPT and what the profile names.
        result = subprocess.run(
            ["sbatch", "--test-only", "--export=ALL"], input=script, text=True, env=variables, capture_output=True
        )
    except FileNotFoundError:
        print("sbatch is not on this machine: SLURM has not been asked", file=sys.stderr)
        return 0
    print(_trimmed(result.stderr), file=sys.stderr)
    if result.returncode and any(words in result.stderr for words in NO_ANSWER):
        raise RunError("SLURM's controller is out of reach, so it has not judged the job: dry-run on a login node")
    if result.returncode:
        raise UserError("SLURM would refuse this job: change --nodes, --nproc or the profile")
    return 0


def _submit(job_script: Path, links: int, variables: dict[str, str]) -> list[str]:
    """Submit one job, or a chain of several; the job ids. Raises UserError where sbatch is missing or says no."""
    command = ["sbatch", "--parsable", "--export=ALL", str(job_script)]
    if links > 1:
        command = ["bash", str(render.TEMPLATES / "chain.sh"), str(links), "--export=ALL", str(job_script)]
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


def _trimmed(text: str) -> str:
    return " ".join(text.split())


def _say(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"remit: {remark}", file=sys.stderr, flush=True)
