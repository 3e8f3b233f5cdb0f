"""The modules that add readers to the framework; a new one is a line here."""

import importlib

MODULES = tuple(f"tests.fuzz.{name}" for name in ("corpora", "datasets", "models", "recipes", "runs", "scores"))


def load() -> None:
    """Import them all, which registers their targets."""
    for name in MODULES:
        importlib.import_module(name)
