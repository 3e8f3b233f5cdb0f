"""The folder of a run: who may write to it, and the recipe it belongs to."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remit_megatron.config import Recipe, load_recipe
from remit_megatron.data.files import Lock, locked, write_atomically
from remit_megatron.errors import RunError, UserError
from remit_megatron.objectives.settings import Rho1Settings
from remit_megatron.objectives.settings_routed import SwitchSettings, TRKDSettings

OURS = ("logs", "status.json", "queue")
"""What a start that failed before its first step, or a scorer that came first, may leave behind."""


class RunFolder:
    """`hold` or `claim` on rank 0 makes the folder this run's; the other ranks only read from it."""

    def __init__(self, path: Path, recipe: Recipe):
        self.path = path
        self.recipe = recipe
        self._held = contextlib.ExitStack()
        self._lock: Lock | None = None

    def check(self) -> None:
        """Raise UserError when the folder holds something else than this recipe's run. Writes nothing."""
        with self._usable():
            self._check()

    def hold(self) -> None:
        """`check`, and lock the folder if it has a run, so that nobody changes what this start plans with.

        Writes nothing else. Raises UserError also where another process holds it.
        """
        self.check()
        if (self.path / "recipe.toml").exists():
            self.claim()

    def claim(self) -> None:
        """Create and lock the folder, and `check` it under the lock. Raises UserError where that cannot be, or another
        process holds it.

        The lock is the kernel's, so it goes with the process that holds it, however that ends.
        """
        if self._lock is not None:
            return
        busy = f"run = '{self.path}' is being trained by another process: wait for it or stop it"
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._held.enter_context(locked(self.path / ".lock", busy=busy))
            self._check()

    @property
    def is_held(self) -> bool:
        """Whether this process holds the folder."""
        return self._lock is not None

    def check_in_place(self) -> None:
        """Raises RunError where the folder that was locked has been moved or removed since."""
        if self._lock is not None and not self._lock.is_in_place():
            raise RunError(
                f"run = '{self.path}' was moved or removed while it was trained: nothing more is written; put it back, "
                "or name its place, and start again: it goes on from its newest checkpoint"
            )

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except RunError as error:
            raise UserError(f"run = '{self.path}' cannot be used: {error}") from None
        except OSError as error:
            raise UserError(f"run = '{self.path}' cannot be used: {error}: name another folder") from None

    def _check(self) -> None:
        known = self.path / "recipe.toml"
        if known.exists():
            try:
                other = load_recipe(known)
            except UserError as error:
                raise UserError(
                    f"run = '{self.path}' was begun by another version of this program ({error}): go on with that "
                    "version, or name another folder"
                ) from None
            different = _difference(other, self.recipe)
            if different:
                raise UserError(
                    f"run = '{self.path}' holds another recipe's run ({different}): name another folder, or remove "
                    "that one"
                )
        elif self.path.exists() and any(p.name[0] != "." and p.name not in OURS for p in self.path.iterdir()):
            raise UserError(f"run = '{self.path}' exists, is not empty and holds no run: name another folder")
        standing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not standing.is_dir() or not os.access(standing, os.W_OK):
            reason = "cannot be written to" if standing.is_dir() else "is no folder"
            raise UserError(f"run = '{self.path}' cannot be used: {standing} {reason}: name another folder")

    def write_recipe(self, text: str) -> None:
        write_atomically(self.path / "recipe.toml", text.encode())

    def release(self) -> None:
        """Let another process have the folder. May be called more than once."""
        self._lock = None
        self._held.close()


def settings_digest(recipe: Recipe) -> str:
    """Of what two starts of one run must have in common in their recipes, 32 hex digits."""
    return hashlib.sha256(json.dumps(_settings(recipe), sort_keys=True).encode()).hexdigest()[:32]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """`Recipe.identity` as far as two starts must agree in it.

    Not: a limit that decides when a run gives up; places of datasets and of the reference, and what precision "auto"
    means, because checkpoints say the content of these themselves. But where tokens of one microbatch compete, how many
    samples it has.
    """
    settings = recipe.identity()
    settings["optimizer"].pop("max_bad_steps")
    settings.pop("compute")
    for source in settings["data"]["train"]:
        source.pop("path")
    if recipe.reference is not None:
        settings["reference"] = True
    objective = recipe.objective
    if isinstance(objective, Rho1Settings | SwitchSettings | TRKDSettings) and objective.scope == "microbatch":
        settings["batch"]["microbatch_samples"] = recipe.batch.microbatch_samples
    return settings


def _difference(one: Recipe, other: Recipe) -> str | None:
    """The first setting in which two recipes differ; None: they may be of one run."""
    a, b = _flat(_settings(one)), _flat(_settings(other))
    key = next((key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)), None)
    return None if key is None else f"{key} = {a.get(key)!r} there, {b.get(key)!r} here"


def _flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
