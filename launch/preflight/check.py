"""The preflight's command: every rank looks, rank 0 gathers, all end with the same verdict.

A fault of the run's folder ends with code 1; one of a node with 87, and FILE then holds the names of the bad nodes,
separated by commas, for the job script to exclude.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from launch.place import torch_variables
from launch.preflight.meeting import BadNodes, Place, connect, tell, told
from launch.preflight.node import look_at_node, read_late
from launch.preflight.room import room_problem
from launch.preflight.together import Report, all_reduce, answer_ping, collect
from remit_megatron.config import Recipe, load_recipe
from remit_megatron.errors import PreflightError, RemitError, RunError


def check_nodes(recipe: Recipe, run: Path, place: Place, timeout_s: float) -> None:
    """Look at every node; called on every rank.

    Raises RunError for the run folder's faults, PreflightError naming the bad nodes.
    """
    token_file = run / "logs" / f".preflight-{os.environ.get('SLURM_JOB_ID', '0')}"
    expected = f"{time.time_ns()}"
    full: str | None = None
    if place.rank == 0:
        try:
            token_file.write_text(expected)
        except OSError as error:
            full = f"{token_file}: cannot be written: {error.strerror or error}: free space there, then start again"
    store = connect(place, serve=place.rank == 0, timeout_s=timeout_s)
    store.set_timeout(timedelta(seconds=4 * timeout_s))
    store.set(f"here/{place.rank}", "")
    device, problems = look_at_node(recipe, place, timeout_s)
    report = Report(problems=problems, token=read_late(token_file))
    store.set(f"report/{place.rank}", json.dumps(asdict(report)))
    if place.rank == 0:
        bad = collect(store, place, expected, timeout_s)
        full = full or room_problem(recipe, run, place.world_size)
        token_file.unlink(missing_ok=True)
        tell(store, place, "verdict", [full, bad])
    else:
        answer_ping(store, place, timeout_s)
        full, bad = told(store, place, "verdict")
    if full:
        raise RunError(full)
    if not bad:
        bad = all_reduce(store, device, place, timeout_s)
    if bad:
        raise BadNodes(bad)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    arguments = parser.parse_args(argv)
    os.environ.update(torch_variables(os.environ))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = Place(
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        ranks_per_node=per_node,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        nodes=tuple(os.environ.get("REMIT_NODES", socket.gethostname()).split(",")),
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    try:
        recipe = load_recipe(arguments.recipe)
        check_nodes(recipe, arguments.run, place, arguments.timeout_s)
        if rank == 0:
            print(f"{len(place.nodes)} nodes, {place.world_size} ranks: devices, disk, clock and all-reduce are well")
        code = 0
    except RemitError as error:
        # What all have found is said once; of what only this rank has found nobody else knows.
        if rank == 0 or type(error) is PreflightError:
            print(f"remit: preflight: {error}", file=sys.stderr)
        if rank == 0 and isinstance(error, BadNodes):
            arguments.report.write_text(",".join(error.names))
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that hangs in its thread must not hold up the verdict.
    os._exit(code)
