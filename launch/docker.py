"""The command that runs a recipe in a container on this machine, with Docker or podman."""

import os
import shutil
from pathlib import Path

from launch.profiles import Profile
from remit_megatron.errors import UserError

IMAGE = "remit-megatron:latest"
"""What `docker build` of this repository's Dockerfile is tagged, where a profile names no image."""


def engine() -> str:
    """Raises UserError where there is none."""
    for name in ("docker", "podman"):
        if shutil.which(name):
            return name
    raise UserError("--on docker: neither docker nor podman is on this machine: install one, or use --on local")


def docker_command(train: list[str], run: Path, profile: Profile, nproc: int) -> list[str]:
    """One container with `nproc` ranks. `train`: the command of `remit`. Files are written as the user who launches."""
    name, container = engine(), profile.container
    workdir = Path.cwd()
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
