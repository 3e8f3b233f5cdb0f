"""The wheel as jobs of a SLURM cluster: a job a stage, each after those that it is made from."""

import os
import subprocess
import sys
from pathlib import Path

from launch.backends import open_backend
from launch.backends.base import Launch, passed_values
from launch.backends.slurm import Slurm, queue, script
from remit_megatron.data.files import make_folder, write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import Wheel
from remit_megatron.flywheel.graph import MID, Node, Plan, make_plan
from remit_megatron.flywheel.mid import recipe_of
from remit_megatron.flywheel.run import claim, is_done, open_contents
from remit_megatron.posttrain.contract import WORK

JOBS, JOB = "jobs", "job"
"""Below the wheel's folder: a folder a stage, with the job script, its logs, and the number of its newest job."""


def submit_wheel(
    file: Path, wheel: Wheel, overrides: list[str], target: str, until: str | None, *, dry_run: bool
) -> int:
    """Submit a job for each stage that is not done and has none; returns the exit code.

    target: slurm or slurm:PROFILE. A job that fails takes those that wait for it with it; the same command submits them
    again. Raises UserError before anything is written where the file or profile will not do, and where sbatch says no.
    """
    backend = open_backend(target)
    assert isinstance(backend, Slurm)
    contents = open_contents(wheel)
    plan = make_plan(wheel, contents)
    wanted = plan.nodes if until is None else plan.needed_for(until)
    todo = [node for node in wanted if not is_done(node, contents)]
    scripts = {node.folder: _script(node, file, plan, overrides, backend) for node in todo}
    if dry_run:
        print(*scripts.values(), sep="\n", end="")
        return 0
    claim(file, wheel)
    contents.save()
    variables = {
        **queue.kept(os.environ, modules=bool(backend.settings.modules)),
        **passed_values(backend.profile),
    }
    jobs: dict[Path, str] = {}
    for node in todo:
        known = _alive(_jobs(node, wheel))
        jobs[node.folder] = known or _submit(node, plan, jobs, scripts[node.folder], variables)
        print(f"{node.name}: job {jobs[node.folder]} {'is there already' if known else 'submitted'}")
    return 0


def _script(node: Node, file: Path, plan: Plan, overrides: list[str], backend: Slurm) -> str:
    """slurm/stage.sbatch with header and settings filled in. Raises UserError for what could not start there."""
    mid = plan.wheel.mid
    first = next(known for known in plan.nodes if known.kind == MID)
    launch = Launch(
        recipe=recipe_of(node if node.kind == MID else first, plan),
        run=_jobs(node, plan.wheel),
        workdir=Path.cwd(),
        nodes=mid.nodes if node.kind == MID else 1,
        nproc=None if backend.settings.tasks_per_node or backend.profile.gpus_per_node else mid.nproc,
    )
    backend.check(launch)
    tasks = script.tasks_per_node(backend.profile, backend.settings, launch.nproc)
    values = script.values(backend.profile, backend.settings, launch, sys.executable)
    values |= {
        "REMIT_WHEEL": str(file.resolve()),
        "REMIT_STAGE": node.folder.name,
        "REMIT_JOBS": str(launch.run),
        "REMIT_TEMPLATES": str(script.TEMPLATES),
        "REMIT_RECIPE": str(node.folder / "recipe.toml"),
        "REMIT_RUN": str(node.folder / WORK / "run"),
    }
    if overrides:
        values["REMIT_OVERRIDES"] = "\n".join(overrides)
    if node.kind != MID:
        del values["REMIT_RUN"], values["REMIT_RECIPE"]
    options = script.header(backend.profile, backend.settings, launch, tasks)
    return script.render("stage.sbatch", options, values, backend.settings.modules)


def _submit(node: Node, plan: Plan, jobs: dict[Path, str], text: str, variables: dict[str, str]) -> str:
    folder = _jobs(node, plan.wheel)
    make_folder(folder / "logs", "wheel")
    write_atomically(folder / "job.sbatch", text.encode())
    with writing(folder):
        (folder / "crashes").unlink(missing_ok=True)
    parents = [source.node.folder for source in node.parents.values() if source.node]
    waits = list(dict.fromkeys(jobs[parent] for parent in parents if parent in jobs))
    line = ["sbatch", "--parsable", "--export=ALL", "--kill-on-invalid-dep=yes"]
    line += [f"--dependency=afterok:{':'.join(waits)}"] if waits else []
    try:
        done = subprocess.run([*line, str(folder / "job.sbatch")], env=variables, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on this machine: run from a login node, or --dry-run") from None
    if done.returncode:
        raise UserError(f"SLURM refuses {folder / 'job.sbatch'}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    write_atomically(folder / JOB, f"{job}\n".encode())
    return job


def _alive(folder: Path) -> str | None:
    """The stage's newest job, where SLURM has not done with it."""
    try:
        job = (folder / JOB).read_text().strip()
    except FileNotFoundError:
        return None
    return job if queue.states([job]) else None


def _jobs(node: Node, wheel: Wheel) -> Path:
    return wheel.folder.resolve() / JOBS / node.folder.name
