"""One rank under srun or torchrun: `python -m launch.rank train RECIPE ...` is `remit train RECIPE ...` as that rank.

Signals that ask the run to stop are held back until the trainer listens.
"""

import itertools
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from launch import environment
from launch.command import become_remit
from launch.place import torch_variables
from remit_megatron.config import load_recipe
from remit_megatron.errors import UserError
from remit_megatron.processes import hold_stop_signals


def main(argv: Sequence[str]) -> NoReturn:
    """argv: a command of `remit` with its recipe. What it sets is in place before that command imports anything."""
    if argv[:1] == ["train"] or "--follow" in argv:  # the commands that listen
        hold_stop_signals()
    os.environ.update(torch_variables(os.environ))
    redirect_output(os.environ)
    apply_rules(argv)
    become_remit(argv)


def redirect_output(variables: Mapping[str, str]) -> None:
    """Under torchrun, whose agent has one log for all its ranks: to this rank's own."""
    if "TORCHELASTIC_RUN_ID" not in variables or "REMIT_LOGS" not in variables:
        return
    path = os.path.join(variables["REMIT_LOGS"], f"rank-{variables['RANK']}.log")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


def apply_rules(argv: Sequence[str]) -> None:
    """Set what `launch.environment` chooses, and say so at the top of the rank's log."""
    overrides = [value for flag, value in itertools.pairwise(argv) if flag == "--set"]
    try:
        recipe = load_recipe(argv[1], overrides)
    except UserError:
        return  # the command itself says it
    cpu = recipe.compute.device == "cpu"
    facts = environment.Facts(
        parallel=recipe.parallel,
        nodes=int(os.environ.get("SLURM_NNODES", "1")),
        compute_capability=None if cpu else environment.compute_capability(),
    )
    added = environment.chosen(facts, os.environ)
    os.environ.update(added)
    said = "  ".join(f"{name}={value}" for name, value in added.items())
    where = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    print(f"{where}: {said}" if said else where, file=sys.stderr, flush=True)
    for line in environment.contradictions(facts, os.environ):
        print(f"warning: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
