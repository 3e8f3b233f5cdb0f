"""The folder of a run: who may write to it, and the recipe it belongs to."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

from remit_megatron.config import Recipe, load_recipe
from remit_megatron.errors import UserError


class RunFolder:
    """`claim` on rank 0 makes the folder this run's; others only read from it."""

    def __init__(self, path: Path, recipe: Recipe):
        self.path = path
        self.recipe = recipe
        self._lock: TextIO | None = None

    def claim(self) -> None:
        """Create and lock the folder. Raises UserError when it holds another recipe's run or another process runs it.

        The lock is the kernel's, so it goes with the process that holds it, however that ends.
        """
        known = self.path / "recipe.toml"
        if known.exists():
            other = load_recipe(known)
            if other.fingerprint() != self.recipe.fingerprint():
                raise UserError(
                    f"run = '{self.path}' holds another recipe's run ({_difference(other, self.recipe)}): name another "
                    "folder, or remove that one"
                )
        elif self.path.exists() and any(p.name != ".lock" and p.name != "logs" for p in self.path.iterdir()):
            raise UserError(f"run = '{self.path}' exists, is not empty and holds no run: name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"run = '{self.path}' is being trained by another process: wait for it or stop it"
            ) from None

    def write_recipe(self, text: str) -> None:
        temporary = self.path / ".recipe.toml.new"
        temporary.write_text(text)
        os.replace(temporary, self.path / "recipe.toml")

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _difference(one: Recipe, other: Recipe) -> str:
    """The first key in which two recipes differ."""
    a, b = _flat(one.model_dump()), _flat(other.model_dump())
    ignored = ("run", "parallel", "compute", "evaluation", "checkpoint", "logging")
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key) and key.partition(".")[0] not in ignored:
            return f"{key} = {a.get(key)!r} there, {b.get(key)!r} here"
    return "compute.precision differs"


def _flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
