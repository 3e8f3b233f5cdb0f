"""This machine: `--on local` starts the ranks as processes here, and stays until they have ended."""

import os
import shlex

from launch import environment, local
from launch.backends.base import Backend, Launch, Started
from launch.command import remit
from launch.profiles import Section


class Local(Backend[Section]):
    name = "local"
    takes_profile = False

    def check(self, launch: Launch) -> None:
        """Any machine that got this far will do."""

    def dry_run(self, launch: Launch) -> int:
        chosen = " ".join(f"{name}={value}" for name, value in _variables(launch).items())
        print(chosen, shlex.join(remit(launch.train)), f"--nproc {launch.nproc or 1}")
        return 0

    def submit(self, launch: Launch) -> Started:
        os.environ.update(_variables(launch))
        return Started(exit_code=local.run_local(remit(launch.train), launch.nproc or 1, listens=True))


def _variables(launch: Launch) -> dict[str, str]:
    capability = None if launch.recipe.compute.device == "cpu" else environment.compute_capability()
    facts = environment.Facts(parallel=launch.recipe.parallel, compute_capability=capability)
    return environment.chosen(facts, os.environ)
