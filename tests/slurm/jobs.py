"""Launching, watching and reading runs on the loopback cluster."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.render import TEMPLATES
from launch.status import Event, read_events
from remit_megatron.config import dump_toml, parse_recipe
from tests.slurm.cluster import Cluster
from tests.train.runs import SAMPLES, SEQUENCE, settings

PROFILE = (TEMPLATES / "profiles" / "loopback.toml").read_text()
STEPS = 24


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe of a test, and where it runs."""

    cluster: Cluster
    data: Path
    folder: Path
    partition: str

    @property
    def recipe(self) -> Path:
        return self.folder.with_suffix(".toml")

    def write_recipe(self, steps: int = STEPS, **changes: Any) -> None:
        values: dict[str, Any] = {
            "schedule": {"train_tokens": steps * SEQUENCE * SAMPLES, "warmup_tokens": 0},
            "checkpoint": {"every_steps": 8, "keep": 2},
            "evaluation": {"every_steps": 0, "samples": 2},
            "parallel": {"tensor": 2},
            **changes,
        }
        recipe = settings(self.data, self.folder.name, **values) | {"run": str(self.folder)}
        self.recipe.write_text(dump_toml(parse_recipe(recipe)))

    def launch(
        self, *arguments: str, profile: str = "", expect: int = 0, nodes: int = 2, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """`remit launch` as a user types it; `profile`: more lines at the profile's top."""
        path = self.folder.with_suffix(".profile.toml")
        path.write_text(profile + "\n" + PROFILE.replace('partition = "main"', f'partition = "{self.partition}"'))
        command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "launch", str(self.recipe)]
        command += ["--on", f"slurm:{path}", "--nodes", str(nodes), "--nproc", "2", *arguments]
        result = subprocess.run(
            command, env={**self.cluster.environment, **variables}, capture_output=True, text=True, cwd=os.getcwd()
        )
        assert result.returncode == expect, result.stdout + result.stderr
        return result

    def submit(self, *arguments: str, **options: Any) -> str:
        """The id of the (first) job."""
        return self.jobs(*arguments, **options)[0]

    def jobs(self, *arguments: str, **options: Any) -> list[str]:
        text = self.launch(*arguments, **options).stdout
        return text.partition("job ")[2].partition(" submitted")[0].split(", ")

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

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(lambda: self.step() >= step, f"step {step} was not reached:\n{self.story()}")

    def wait_for_end(self, job: str) -> dict[str, str]:
        self.cluster.wait(lambda: self.cluster.ended(job), f"job {job} did not end:\n{self.story()}")
        return self.cluster.job(job)

    def story(self) -> str:
        """Everything that a failing test should show."""
        texts = [f"{event}" for event in self.events]
        for log in sorted(self.folder.glob("logs/**/*.log")):
            texts += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(texts)
