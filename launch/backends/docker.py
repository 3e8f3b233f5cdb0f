"""A container on this machine: `--on docker` runs the ranks with Docker or podman, and stays until they have ended."""

import os
import shlex
import shutil
from pathlib import Path

from launch.backends.base import Backend, Launch, Started, passed_values
from launch.local import run_client
from launch.profiles import Profile, Section
from remit_megatron.errors import UserError

IMAGE = "remit-megatron:latest"
"""What `docker build` of this repository's Dockerfile is tagged, where a profile names no image."""


class Docker(Backend[Section]):
    name = "docker"

    def check(self, launch: Launch) -> None:
        passed_values(self.profile)
        engine()
        for path in (launch.run, launch.workdir):
            if ":" in str(path):
                raise UserError(f"{path}: a mount reads no path with a colon: use another folder")

    def dry_run(self, launch: Launch) -> int:
        print(shlex.join(self._command(launch)))
        return 0

    def submit(self, launch: Launch) -> Started:
        variables = {**os.environ, **passed_values(self.profile)}
        return Started(exit_code=run_client(self._command(launch), variables))

    def _command(self, launch: Launch) -> list[str]:
        nproc = launch.nproc or self.profile.gpus_per_node or 1
        return docker_command(launch.train, launch.run, launch.workdir, self.profile, nproc)


def engine() -> str:
    """Raises UserError where there is none."""
    for name in ("docker", "podman"):
        if shutil.which(name):
            return name
    raise UserError("--on docker: neither docker nor podman is on this machine: install one, or use --on local")


def docker_command(train: list[str], run: Path, workdir: Path, profile: Profile, nproc: int) -> list[str]:
    """One container with `nproc` ranks. `train`: the command of `remit`. Files are written as the user who launches."""
    name, container = engine(), profile.container
    command = [name, "run", "--rm", "--init"]
    # NCCL and the data loader share memory between ranks, and pin it.
    command += ["--ipc=host", "--network=host", "--ulimit=memlock=-1"]
    if profile.gpus_per_node or shutil.which("nvidia-smi"):
        command += ["--device=nvidia.com/gpu=all"] if name == "podman" else ["--gpus=all"]
    if name == "podman":
        command += ["--userns=keep-id"]
    else:
        command += [f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/tmp"]
    mounts = {str(workdir): str(workdir), str(run): str(run)}
    command += [f"--volume={source}:{target}" for source, target in mounts.items()]
    command += [f"--volume={mount}" for mount in (container.mounts if container else ())]
    command += [f"--env={variable}={value}" for variable, value in profile.environment.set.items()]
    # A name without a value: the engine takes it from its own environment, so no command line tells it.
    command += [f"--env={variable}" for variable in profile.environment.passed]
    command += [f"--workdir={(container and container.workdir) or workdir}"]
    return [*command, container.image if container else IMAGE, "remit", *train, "--nproc", str(nproc)]
