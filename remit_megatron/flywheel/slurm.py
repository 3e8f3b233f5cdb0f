"""The wheel as jobs of a SLURM cluster: a job a stage, each after those that it is made from."""

import os
import subprocess
import sys
from pathlib import Path

from launch import render, run_folder
from launch.profiles import Profile, load_profile
from launch.submit import kept, passed_values
from remit_megatron.data.files import make_folder, write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import Wheel
from remit_megatron.flywheel.graph import MID, Node, Plan, make_plan
from remit_megatron.flywheel.run import claim, is_done, open_contents
from remit_megatron.posttrain.contract import WORK

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "RESIZING", "SIGNALING")
JOBS, JOB = "jobs", "job"
"""Below the wheel's folder: a folder a stage, with the job script, its logs, and the number of its newest job."""


def submit_wheel(
    file: Path, wheel: Wheel, overrides: list[str], profile_name: str, until: str | None, *, dry_run: bool
) -> int:
    """Submit a job for each stage that is not done and has none; returns the exit code.

    A job that fails takes those that wait for it with it; the same command submits them again. Raises UserError before
    anything is written where the file or profile will not do, and where sbatch says no.
    """
    profile = load_profile(profile_name)
    contents = open_contents(wheel)
    plan = make_plan(wheel, contents)
    wanted = plan.nodes if until is None else plan.needed_for(until)
    todo = [node for node in wanted if not is_done(node, contents)]
    folder = wheel.folder.resolve()
    run_folder.check_shared(folder, wheel.mid.nodes, profile.shared_folders)
    secrets = passed_values(profile)
    scripts = {node.folder: script(node, file, wheel, overrides, profile) for node in todo}
    if dry_run:
        print(*scripts.values(), sep="\n", end="")
        return 0
    claim(file, wheel)
    contents.save()
    environment = {**kept(os.environ, modules=bool(profile.modules)), **secrets}
    jobs: dict[Path, str] = {}
    for node in todo:
        known = _alive(_jobs(node, wheel), environment)
        if known:
            jobs[node.folder] = known
            print(f"{node.name}: job {known} is there already")
            continue
        jobs[node.folder] = _submit(node, plan, jobs, scripts[node.folder], environment)
        print(f"{node.name}: job {jobs[node.folder]} submitted")
    return 0


def script(node: Node, file: Path, wheel: Wheel, overrides: list[str], profile: Profile) -> str:
    """The job's script: slurm/stage.sbatch with header and settings filled in."""
    jobs, workdir = _jobs(node, wheel), Path.cwd()
    mid = node.kind == MID
    nproc = wheel.mid.nproc if not (profile.tasks_per_node or profile.gpus_per_node) else None
    tasks = render.tasks_per_node(profile, nproc)
    options = render.header(
        profile, jobs, f"{wheel.folder.name}-{node.name}", wheel.mid.nodes if mid else 1, tasks, workdir
    )
    run = node.folder / WORK / "run"
    values = render.settings(profile, run, sys.executable, workdir)
    values |= {
        "REMIT_WHEEL": str(file.resolve()),
        "REMIT_STAGE": node.folder.name,
        "REMIT_JOBS": str(jobs),
        "REMIT_TEMPLATES": str(render.TEMPLATES),
        "REMIT_RECIPE": str(node.folder / "recipe.toml"),
    }
    if overrides:
        values["REMIT_OVERRIDES"] = "\n".join(overrides)
    if not mid:
        del values["REMIT_RUN"], values["REMIT_RECIPE"]
    return render.render("stage.sbatch", options, values, profile.modules)


def _submit(node: Node, plan: Plan, jobs: dict[Path, str], text: str, environment: dict[str, str]) -> str:
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
        done = subprocess.run([*line, str(folder / "job.sbatch")], env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on this machine: run from a login node, or --dry-run") from None
    if done.returncode:
        raise UserError(f"SLURM refuses {folder / 'job.sbatch'}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    write_atomically(folder / JOB, f"{job}\n".encode())
    return job


def _alive(folder: Path, environment: dict[str, str]) -> str | None:
    """The stage's newest job, where it waits or runs."""
    try:
        job = (folder / JOB).read_text().strip()
        said = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return job if said.stdout.strip() in ALIVE else None


def _jobs(node: Node, wheel: Wheel) -> Path:
    return wheel.folder.resolve() / JOBS / node.folder.name
