"""The run folder before the job: the locked recipe and what the run was launched from."""

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import remit_megatron
from remit_megatron.config import Recipe, dump_toml
from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError
from remit_megatron.run.folder import RunFolder

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
LOCAL_TYPES = ("tmpfs", "ramfs", "overlay")


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
    before = _read(run / "code.json")
    if before and before.get("commit") != code["commit"]:
        remarks.append(f"the run was begun with commit {before.get('commit')}, and goes on with {code['commit']}")
        write_atomically(
            run / f"code.{before.get('launched_unix_s', 0):.0f}.json", json.dumps(before, indent=1).encode()
        )
    write_atomically(run / "recipe.toml", dump_toml(recipe).encode())
    write_atomically(run / "code.json", (json.dumps(code, indent=1) + "\n").encode())
    write_atomically(run / "code.diff", diff)
    write_atomically(run / "environment.txt", "".join(f"{line}\n" for line in installed()).encode())
    if code["dirty"]:
        remarks.append(f"the code has changes that no commit has: {run / 'code.diff'}")
    return remarks


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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
