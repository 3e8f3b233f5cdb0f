"""The run folder before the job: the locked recipe and what the run was launched from."""

import importlib.metadata
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import remit_megatron
from launch.record import CodeFile, read_file
from remit_megatron.config import Recipe, dump_toml
from remit_megatron.data.files import is_held, write_atomically
from remit_megatron.errors import UserError
from remit_megatron.run.folder import RunFolder

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
LOCAL_TYPES = ("tmpfs", "ramfs", "overlay")
LOCK = ".lock"
"""What the process that trains in a run folder holds."""


def check_shared(run: Path, nodes: int, shared_folders: tuple[str, ...]) -> None:
    """Raise UserError for a folder that each of several nodes would have to itself."""
    if nodes == 1 or any(run.is_relative_to(folder) for folder in shared_folders):
        return
    local = next((folder for folder in NODE_LOCAL if run.is_relative_to(folder)), None)
    kind = _filesystem(run)
    if local or kind in LOCAL_TYPES:
        raise UserError(
            f"run = '{run}' is on {local or kind}, which {nodes} nodes do not share: name a folder on a shared "
            "filesystem, or list it in the profile's shared_folders"
        )


def _filesystem(path: Path) -> str | None:
    """Type of the filesystem that a path is on or will be on."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return None
    at = [(len(folder), kind) for folder, kind in mounts if path.is_relative_to(folder.replace("\\040", " "))]
    # The root of a container is an overlay, and says nothing.
    longest = max(at, default=(1, None))
    return longest[1] if longest[0] > 1 else None


def check_free(run: Path, recipe: Recipe) -> None:
    """Raise UserError where the folder holds something else, or cannot be written to."""
    RunFolder(run, recipe).check()
    existing = next(folder for folder in (run, *run.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"run = '{run}': {existing} is no folder: name another one")


def lock_is_held(run: Path) -> bool | None:
    """Whether a process trains in a run folder, as far as this machine sees locks of its file system; None: unknown."""
    try:
        return is_held(run / LOCK) if (run / LOCK).exists() else None
    except OSError:
        return None


def prepare(run: Path, recipe: Recipe) -> list[str]:
    """Create the folder: recipe.toml, code.json, code.diff, environment.txt, logs/. Returns remarks for the user.

    A run that is there already keeps everything, and gets today's code and environment beside its recipe.
    """
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run = '{run}' cannot be used: {error}: name another folder") from None
    remarks = []
    code, diff = code_state()
    try:
        before = read_file(run / "code.json", CodeFile)
    except UserError as error:
        remarks.append(f"{error}; it is written anew")
        before = None
    if before and before.commit != code["commit"]:
        remarks.append(f"the run was begun with commit {before.commit}, and goes on with {code['commit']}")
        _write_json(run / f"code.{before.launched_unix_s:.0f}.json", before.model_dump(exclude_unset=True))
    write_atomically(run / "recipe.toml", dump_toml(recipe).encode())
    _write_json(run / "code.json", code)
    write_atomically(run / "code.diff", diff)
    write_atomically(run / "environment.txt", "".join(f"{line}\n" for line in installed()).encode())
    if code["dirty"]:
        remarks.append(f"the code has changes that no commit has: {run / 'code.diff'}")
    return remarks


def record_launch(run: Path, backend: str, jobs: Sequence[str] = ()) -> None:
    """Write launch.json, by which `remit status` knows whom to ask."""
    _write_json(run / "launch.json", {"backend": backend, "jobs": list(jobs), "launched_unix_s": time.time()})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def code_state() -> tuple[dict[str, Any], bytes]:
    """Version, commit and uncommitted changes of the code that runs here; a commit only where it is a git checkout."""
    root = Path(remit_megatron.__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    state = {
        "version": remit_megatron.__version__,
        "path": str(root),
        "commit": commit.decode().strip() if commit else None,
        "dirty": bool(status.strip()) if status is not None else None,
        "changed_files": status.decode(errors="replace").splitlines() if status else [],
        "launched_unix_s": time.time(),
    }
    return state, _git(root, "diff", "--binary", "HEAD") or b""


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


def installed() -> list[str]:
    """Every installed distribution as `name==version`."""
    found = {(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)
