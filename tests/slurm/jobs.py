"""Launching, watching and reading runs on the loopback cluster."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.profiles import SHIPPED
from launch.record import Event, read_events
from remit_megatron.config import dump_toml, parse_recipe
from tests.slurm.cluster import Cluster
from tests.train.runs import SAMPLES, SEQUENCE, settings

ROOT = Path(__file__).parents[2]
STEPS = 40
RANKS_OF = {b"launch.rank", b"remit_megatron.cli"}
"""What a rank's command line has, before and after it has become `remit`."""
QUIET = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def recipe_text(data: Path, folder: Path, /, steps: int = STEPS, **changes: Any) -> str:
    """A run of two tensor-parallel ranks, or a multiple of two, with a checkpoint every 8 steps."""
    values: dict[str, Any] = {
        "schedule": {"train_tokens": steps * SEQUENCE * SAMPLES, "warmup_tokens": 0},
        "checkpoint": {"every_steps": 8, "keep": 2},
        "evaluation": {"every_steps": 0, "samples": 2},
        "parallel": {"tensor": 2},
        **changes,
    }
    return dump_toml(parse_recipe(settings(data, folder.name, **values) | {"run": str(folder)}))


def profile_text(settings: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML; JSON's scalars and lists are TOML's."""
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [profile_text(value, (*path, key)) for key, value in settings.items() if isinstance(value, dict)]
    return "\n".join([*lines, *tables])


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe of a test, and where it runs."""

    cluster: Cluster
    folder: Path
    pair: int
    nproc: int = 1
    """Ranks a node."""

    @property
    def recipe(self) -> Path:
        return self.folder.with_suffix(".toml")

    def launch(
        self,
        *arguments: str,
        profile: dict[str, Any] | None = None,
        expect: int = 0,
        nodes: int = 2,
        cwd: Path = ROOT,
        variables: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`remit launch` as a user types it; `profile`: what differs from the shipped one for loopback, `container` and
        `environment` as sections, everything else of [slurm].

        No preflight unless the profile says so: it costs as much as a start.
        """
        path = self.folder.with_suffix(".profile.toml")
        settings = tomllib.loads((SHIPPED / "loopback.toml").read_text())
        # A machine that has other work may need many times the minutes of the shipped limit.
        settings["slurm"] |= {"partition": f"pair{self.pair}", "preflight": False, "time_limit": "60"}
        for key, value in (profile or {}).items():
            (settings if key in ("container", "environment") else settings["slurm"])[key] = value
        # Hundreds of lines of Megatron's, in logs that a failing test shows.
        settings["environment"]["set"]["PYTHONWARNINGS"] = "ignore"
        path.write_text(profile_text(settings))
        command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "launch", str(self.recipe)]
        command += ["--on", f"slurm:{path}", "--nodes", str(nodes), "--nproc", str(self.nproc), *arguments]
        environment = {**self.cluster.environment, **QUIET, **(variables or {})}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
        assert result.returncode == expect, result.stdout + result.stderr
        return result

    def submit(self, *arguments: str, **options: Any) -> str:
        """The id of the (first) job."""
        return self.jobs(*arguments, **options)[0]

    def jobs(self, *arguments: str, **options: Any) -> list[str]:
        text = self.launch(*arguments, **options).stdout
        return text.partition(": job ")[2].partition(" submitted")[0].split(", ")

    # Processes.

    def ranks(self, job: str) -> list[int]:
        """Process ids of the ranks of a job that live now."""
        wanted = f"SLURM_JOB_ID={job}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                # srun, and the agent of torchrun, name the command of their ranks further on.
                is_rank = b"python" in words[0] and RANKS_OF & set(words[1:4]) if words else False
                if is_rank and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    @contextlib.contextmanager
    def paused(self, job: str) -> Iterator[list[int]]:
        """All ranks stand still, so that what the test does next happens in the middle of the run."""
        ranks = self.ranks(job)
        assert ranks, self.story()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield ranks
        finally:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    # Reading.

    @property
    def events(self) -> list[Event]:
        return read_events(self.folder)

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    @property
    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def step(self) -> int:
        """Of the last line of metrics.jsonl."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (OSError, ValueError):
            return 0

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        return int((self.folder / "checkpoints" / "latest").read_text().removeprefix("step-"))

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step} was not reached")

    def wait_for_end(self, job: str) -> dict[str, str]:
        self.wait(lambda: self.cluster.ended(job), f"job {job} did not end")
        return self.cluster.job(job)

    def wait(self, condition: Any, otherwise: str, timeout_s: float = 1800) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}:\n{self.story()}"
            time.sleep(0.02)

    def story(self) -> str:
        """Everything that a failing test should show."""
        texts = [f"{event}" for event in self.events]
        for log in sorted(self.folder.glob("logs/**/*.log")):
            texts += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(texts)


def batch_script(job: str) -> int:
    """Process id of the job's script."""
    wanted = f"SLURM_JOB_ID={job}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text() == "slurm_script\n":
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                mine = wanted in (entry / "environ").read_bytes().split(b"\0")
                if mine and (Path("/proc") / parent / "comm").read_text() == "slurmstepd\n":
                    return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"job {job} has no script")


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that stands still will get this signal when it goes on."""
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
