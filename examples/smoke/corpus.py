"""Code documents: the sources of the running Python's own standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.errors import UserError

# Test suites and character tables are repetitive, site-packages is not the standard library, the rest is of one build.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
    | {"__pycache__", "lib-dynload"}
)
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 500
HELD_OUT_IN_16 = 1


@dataclass(frozen=True, slots=True)
class CodeFile:
    """One source file; `path` is relative to the standard library and uses forward slashes."""

    path: str
    text: str


def is_held_out(key: str, shares_of_16: int = HELD_OUT_IN_16) -> bool:
    """Whether the hash of `key` falls in the held-out `shares_of_16` of 16 equal parts, whatever the machine."""
    return hashlib.sha256(key.encode()).digest()[0] % 16 < shares_of_16


def _is_skipped(relative: Path) -> bool:
    return any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts[:-1])


def code_files(root: Path | None = None) -> list[CodeFile]:
    """Every UTF-8 source file of a usual size under `root` (default: the standard library), ordered by its path's hash.

    The hash order spreads packages evenly, so that any prefix of the list is a fair sample.

    Raises UserError where fewer than 50 files are found (a stripped or zipped Python).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _is_skipped(relative) or not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        found.append(CodeFile(relative.as_posix(), text))
    if len(found) < 50:
        raise UserError(
            f"{root} holds {len(found)} usable .py files, at least 50 are needed: use a full Python 3.11 install"
        )
    return sorted(found, key=lambda file: (hashlib.sha256(file.path.encode()).digest(), file.path))


def split_code(files: list[CodeFile]) -> tuple[list[CodeFile], list[CodeFile]]:
    """(training files, held-out files); a file is wholly in one of them, decided by the hash of its path."""
    held_out = [file for file in files if is_held_out(file.path)]
    return [file for file in files if not is_held_out(file.path)], held_out
