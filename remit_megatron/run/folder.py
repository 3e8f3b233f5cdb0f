"""The folder of a run: who may write to it, and the recipe it belongs to."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

from remit_megatron.config import Recipe, load_recipe
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError

OURS = ("logs", "status.json", "queue")
"""What a start that failed before its first step, or a scorer that came first, may leave behind."""


class RunFolder:
    """`claim` on rank 0 makes the folder this run's; the other ranks only read from it."""

    def __init__(self, path: Path, recipe: Recipe):
        self.path = path
        self.recipe = recipe
        self._lock: TextIO | None = None

    def check(self) -> None:
        """Raise UserError when the folder holds something else than this recipe's run. Writes nothing."""
        try:
            self._check()
        except OSError as error:
            raise UserError(f"run = '{self.path}' cannot be used: {error}: name another folder") from None

    def claim(self) -> None:
        """Create and lock the folder. Raises UserError where that cannot be, or another process holds it.

        The lock is the kernel's, so it goes with the process that holds it, however that ends.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run = '{self.path}' is being trained by another process: wait for it or stop it"
            ) from None
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
            if other.fingerprint() != self.recipe.fingerprint():
                raise UserError(
                    f"run = '{self.path}' holds another recipe's run ({_difference(other, self.recipe)}): name another "
                    "folder, or remove that one"
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
        if self._lock is not None:
            self._lock.close()


def _difference(one: Recipe, other: Recipe) -> str:
    """The first setting in which two recipes differ."""
    a, b = _flat(one.identity()), _flat(other.identity())
    key = next(key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
    return f"{key} = {a.get(key)!r} there, {b.get(key)!r} here"


def _flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
