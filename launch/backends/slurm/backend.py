"""The back end itself: what a launch becomes on a cluster."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.backends.base import Backend, Launch, Life, Started, passed_values
from launch.backends.slurm import queue, script
from launch.backends.slurm.log import show_until_the_end
from launch.backends.slurm.settings import SlurmSettings
from launch.record import end_of, read_events
from launch.run_folder import check_shared
from remit_megatron.data.files import write_atomically


class Slurm(Backend[SlurmSettings]):
    name = "slurm"
    default_profile = "gpu"
    flags = frozenset({"--nodes", "--chain", "--follow"})
    settings_model = SlurmSettings

    def check(self, launch: Launch) -> None:
        script.tasks_per_node(self.profile, self.settings, launch.nproc)
        script.check_paths(launch.run, launch.workdir)
        script.check_mounts(self.profile)
        check_shared(launch.run, launch.nodes, self.settings.shared_folders)
        passed_values(self.profile)

    def dry_run(self, launch: Launch) -> int:
        text = self._script(launch)
        print(text, end="")
        queue.test_only(text, self._variables())
        return 0

    def submit(self, launch: Launch) -> Started:
        path = launch.run / "job.sbatch"
        write_atomically(path, self._script(launch).encode())
        jobs = queue.submit(path, launch.chain, self._variables())
        print(f"{launch.run}: job {', '.join(jobs)} submitted; remit status {shlex.quote(str(launch.run))}")
        return Started(jobs=tuple(jobs))

    def follow(self, launch: Launch, started: Started) -> int | None:
        if not show_until_the_end(launch.run, started.jobs):
            return None
        code = end_of(started.jobs, read_events(launch.run))
        return 1 if code is None else code

    @staticmethod
    def status(run: Path, jobs: Sequence[str], host: str | None) -> Life | None:
        """By the jobs that SLURM still has; where it does not answer, by the run folder's lock."""
        states = queue.states(jobs)
        if states is None:
            return Backend.status(run, jobs, host)
        if any(state not in queue.WAITING for state in states):
            return Life.LIVES
        return Life.WAITS if states else Life.GONE

    def _script(self, launch: Launch) -> str:
        tasks = script.tasks_per_node(self.profile, self.settings, launch.nproc)
        options = script.header(self.profile, self.settings, launch, tasks)
        values = script.values(self.profile, self.settings, launch, sys.executable)
        return script.render("train.sbatch", options, values, self.settings.modules)

    def _variables(self) -> dict[str, str]:
        return {**queue.kept(os.environ, modules=bool(self.settings.modules)), **passed_values(self.profile)}
