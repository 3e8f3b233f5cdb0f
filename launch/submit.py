"""`remit launch`: one recipe to the place that --on names."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import run_folder
from launch.backends import open_backend, with_flag
from launch.backends.base import Launch
from launch.status import report
from remit_megatron.config import load_recipe
from remit_megatron.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line says."""

    recipe: str
    overrides: tuple[str, ...] = ()
    target: str = "local"
    """A back end's name, or `NAME:PROFILE`."""
    nodes: int = 1
    nproc: int | None = None
    """Ranks a node."""
    chain: int = 1
    dry_run: bool = False
    follow: bool = False
    fallback: bool = False
    """Of `remit train`."""


def launch(request: Request) -> int:
    """Launch a run; returns the exit code. Raises UserError before anything is written, RunError if SLURM refuses."""
    backend = open_backend(request.target)
    given = {"--nodes": request.nodes > 1, "--chain": request.chain > 1, "--follow": request.follow}
    for flag in (flag for flag, is_given in given.items() if is_given and flag not in backend.flags):
        raise UserError(f"{flag} goes with --on {' or '.join(with_flag(flag))}")
    recipe = load_recipe(request.recipe, request.overrides)
    one = Launch(
        recipe=recipe,
        run=Path(recipe.run).resolve(),
        workdir=Path.cwd(),
        nodes=request.nodes,
        nproc=request.nproc,
        chain=request.chain,
        arguments=("--fallback",) if request.fallback else (),
    )
    run_folder.check_free(one.run, recipe)
    backend.check(one)
    if request.dry_run:
        return backend.dry_run(one)
    _say(run_folder.prepare(one.run, recipe))
    run_folder.record_launch(one.run, backend.name)
    started = backend.submit(one)
    if started.jobs:
        run_folder.record_launch(one.run, backend.name, started.jobs)
    if started.exit_code is not None:
        return started.exit_code
    if not request.follow:
        return 0
    code = backend.follow(one, started)
    if code is None:
        return 0  # the run goes on
    print(report(one.run))
    return code


def _say(remarks: Sequence[str]) -> None:
    for remark in remarks:
        print(f"remit: {remark}", file=sys.stderr, flush=True)
