"""`remit train --nproc N --scorers M`: a run and its scorer on one machine, as two groups of ranks."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Mapping

from launch.command import remit
from launch.local import run_local
from remit_megatron.config import Recipe
from remit_megatron.errors import UserError
from remit_megatron.processes import die_with_parent

GRACE_S = 10.0
"""How long a scorer may take to end when the run has ended."""


def run_with_scorers(recipe: Recipe, both: list[str], train: list[str], nproc: int | None, scorers: int) -> int:
    """Start both, and end as the run ends; returns its exit code.

    both: arguments of the two commands, the recipe first; train: more of `remit train`. A scorer that ends early stops
    nothing: the run notices and scores online, or as reference.queue.fallback says. Raises UserError for a recipe
    without a reference, or too few devices.
    """
    if nproc is None:
        raise UserError(
            "--scorers goes with --nproc: on a cluster start `remit score RECIPE --follow` as a job of its own"
        )
    if recipe.reference is None:
        raise UserError("--scorers: the recipe has no [reference] to score with")
    if recipe.reference.queue is None:
        both = [*both, "--set", "reference.queue.fallback=online"]
    environment = {**os.environ, **devices(os.environ, nproc, scorers)}
    scorer = subprocess.Popen(
        remit(["score", *both, "--follow", "--nproc", str(scorers)]),
        env=environment,
        start_new_session=True,  # Ctrl-C is for the run, which still needs scores for the step that it finishes
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    code = None
    try:
        code = run_local(remit(["train", *both, *train]), nproc, listens=True)
        return code
    finally:
        if code == 0:  # it then hears that the run is done
            with contextlib.suppress(subprocess.TimeoutExpired):
                scorer.wait(GRACE_S)
        scorer.send_signal(signal.SIGTERM)
        try:
            scorer.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            scorer.kill()
            scorer.wait()


def devices(variables: Mapping[str, str], nproc: int, scorers: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of the scorer's ranks: those after the run's. Raises UserError where they are too few."""
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return {}  # all devices are hidden, and stay so
    known = visible.split(",") if visible else [str(i) for i in range(nproc + scorers)]
    if len(known) < nproc + scorers:
        raise UserError(
            f"--nproc {nproc} --scorers {scorers}: CUDA_VISIBLE_DEVICES = {visible} names {len(known)} devices only"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(known[nproc : nproc + scorers])}
