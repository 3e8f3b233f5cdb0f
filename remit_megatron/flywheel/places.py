"""Where the stages run: in this process, each in a container, or each as a job of a SLURM cluster."""

import os
from pathlib import Path

from remit_megatron.errors import RemitError, UserError
from remit_megatron.flywheel.config import Wheel
from remit_megatron.flywheel.graph import MID, Node, make_plan
from remit_megatron.flywheel.run import claim, open_contents, run_node, run_wheel


def run_at(
    file: Path,
    wheel: Wheel,
    *,
    overrides: list[str],
    target: str = "local",
    until: str | None = None,
    only: str | None = None,
    prepare: bool = False,
    dry_run: bool = False,
) -> int:
    """Run a wheel; returns the exit code. Raises UserError for a target that there is not."""
    kind, _, profile = target.partition(":")
    if kind not in ("local", "docker", "slurm") or (kind == "local" and profile):
        raise UserError(f"--on {target}: say local, docker, docker:PROFILE, slurm or slurm:PROFILE")
    if dry_run and kind != "slurm":
        raise UserError("--dry-run goes with --on slurm")
    if only is not None:
        if until is not None or kind != "local":
            raise UserError("--only runs one stage here: --until and --on do not go with it")
        run_only(file, wheel, only, prepare=prepare)
        return 0
    if prepare:
        raise UserError("--prepare goes with --only")
    if kind == "slurm":
        from remit_megatron.flywheel.slurm import submit_wheel

        return submit_wheel(file, wheel, overrides, target, until, dry_run=dry_run)
    run_wheel(file, wheel, until, _Container(file, wheel, overrides, target) if kind == "docker" else None)
    return 0


def run_only(file: Path, wheel: Wheel, name: str, *, prepare: bool = False) -> None:
    """One stage whose parents are done. name: the stage's, or its folder's, which a changed setting gives another.

    prepare: only until `remit train` may start on its recipe.toml. Raises UserError where no stage of the file has
    that name.
    """
    contents = open_contents(wheel)
    plan = make_plan(wheel, contents)
    found = [node for node in plan.nodes if name in (*node.names, node.folder.name)]
    if not found:
        raise UserError(f"--only {name}: no such stage in {file}; a changed setting or datum gives a stage another key")
    claim(file, wheel)
    if prepare and found[0].kind != MID:
        raise UserError(f"--prepare is for mid-training, and {name} is {found[0].kind}")
    run_node(found[0], plan, contents, prepare=prepare)
    contents.save()


class _Container:
    """Runs each stage by `remit flywheel run --only` in a container of its own."""

    def __init__(self, file: Path, wheel: Wheel, overrides: list[str], target: str):
        from launch.backends import open_backend

        self.file, self.wheel, self.overrides = file, wheel, overrides
        self.profile = open_backend(target).profile

    def __call__(self, node: Node) -> None:
        from launch.backends.base import passed_values
        from launch.backends.docker import docker_command
        from launch.local import run_client

        secrets = passed_values(self.profile)
        words = ["flywheel", "run", str(self.file.absolute()), "--only", node.folder.name]
        words += [part for override in self.overrides for part in ("--set", override)]
        line = docker_command(words, self.wheel.folder.absolute(), Path.cwd(), self.profile, 1)
        code = run_client(line[:-2], {**os.environ, **secrets})  # without --nproc: the stages have their own
        if code:
            error = RemitError(f"{node.name}: its container ended with exit code {code}")
            error.exit_code = code
            raise error
