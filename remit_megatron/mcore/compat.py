"""What this machine's Megatron-Core and its optional companions offer, found by probing."""

import functools
import importlib
import importlib.metadata
import importlib.util


def importable(module: str) -> bool:
    """Whether `module` is installed and imports here; a broken install counts as absent."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def has_transformer_engine() -> bool:
    return importable("transformer_engine.pytorch")


@functools.cache
def has_apex() -> bool:
    return importable("apex.optimizers")
