"""PREFIX.parts/: where a dataset is made, and how it appears under its name.

Every command that writes a dataset claims its name with a lock first and looks at what is there afterwards. What it
makes lies in the work folder; `commit.json`, the manifest to be, says that it is complete. From then on `publish` only
renames, and goes on from whatever point an earlier try reached. The folder goes last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remit_megatron.data.checksums import read_record, write_record
from remit_megatron.data.files import clear_dead, fsync_folder, locked, make_folder, temporary_name, writing
from remit_megatron.data.indexed import bin_path, idx_path
from remit_megatron.data.manifest import Manifest, manifest_path
from remit_megatron.data.tokenizer import same_tokenizer
from remit_megatron.errors import UserError

WORK_SUFFIX = ".parts"
PLAN = "plan.json"
COMMIT = "commit.json"
STATE = "state.json"
BESIDE = {"all.bad": ".bad.jsonl", "all.select": ".select.json"}
"""Files of the work folder that are published beside the dataset, and their endings there."""


def check_prefix(prefix: str) -> None:
    """Raise UserError for a name that no dataset can have: a folder's, an empty one, or a longer one than files may."""
    if prefix.endswith(os.sep) or os.path.isdir(prefix):
        raise UserError(f"--output {prefix}: a folder; a dataset is a prefix such as {prefix.rstrip(os.sep)}/corpus")
    name = Path(prefix).name
    longest = len(os.fsencode(name)) + len(".manifest.json")
    if not name or "\0" in prefix:
        raise UserError(f"--output {prefix!r}: no name of a file; a dataset is a prefix such as tokens/corpus")
    if longest > 255:
        raise UserError(f"--output {prefix}: a name of {longest - 14} bytes; 241 are possible: choose a shorter one")


@contextmanager
def claimed(prefix: str) -> Iterator[Path]:
    """The work folder of a dataset, which no other process has meanwhile. It stays where something is in it.

    Raises UserError where another process has it, or the name cannot be used, NoLocks on a file system without locks.
    """
    check_prefix(prefix)
    folder = work_path(prefix)
    make_folder(folder.parent, "--output")
    busy = f"{folder}: another run works on it; wait for it or choose another --output"
    with locked(folder.with_name(f".{Path(prefix).name}.lock"), busy, remove=True):
        for name in (folder.name, *(f"{Path(prefix).name}{end}" for end in (".manifest.json", *BESIDE.values()))):
            clear_dead(folder.parent, name)
        _remove(Path(f"{folder}.done"))  # as earlier versions named it
        with writing(folder):
            folder.mkdir(exist_ok=True)
        clear_dead(folder)
        try:
            yield folder
        finally:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def work_path(prefix: str) -> Path:
    return Path(f"{prefix}{WORK_SUFFIX}")


def made_before(prefix: str, folder: Path, wanted: dict[str, Any], overwrite: bool) -> Manifest | None:
    """What an earlier start of this very command made: published where that is still to be done. None: make it.

    wanted: as of `existing`. Raises UserError where the name is another dataset's, finished or not.
    """
    if not is_complete(folder):
        return None if overwrite else existing(prefix, wanted)
    if not _is_of(Manifest.load(folder / COMMIT), wanted):
        raise UserError(
            f"{folder}: holds what another command has made and did not publish: repeat that command, delete the "
            "folder, or choose another --output"
        )
    return publish(prefix, folder)


def existing(prefix: str, wanted: dict[str, Any]) -> Manifest | None:
    """The manifest of a dataset that this very command has made, None where there is no dataset of that name.

    wanted: what the manifest's fields and its provenance must be. Raises UserError for a dataset of another kind.
    """
    if not idx_path(prefix).exists():
        return None
    manifest = Manifest.read(prefix)
    if manifest is None or not bin_path(prefix).exists() or not _is_of(manifest, wanted):
        raise UserError(f"{idx_path(prefix)}: exists already; use --overwrite or another --output")
    return manifest


def _is_of(manifest: Manifest, wanted: dict[str, Any]) -> bool:
    found = {**manifest.provenance, **manifest.model_dump(exclude={"provenance"})}
    return all(name in found and same_value(name, found[name], value) for name, value in as_json(wanted).items())


def same_value(name: str, one: Any, other: Any) -> bool:
    """Whether two records agree in a field; a tokenizer may be known by an identity of before, or from another file."""
    known = name in ("tokenizer", "tokenizer_hash") and isinstance(one, str) and isinstance(other, str)
    return same_tokenizer(one, other) if known else bool(one == other)


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As it is read back from a JSON file."""
    copy: dict[str, Any] = json.loads(json.dumps(content))
    return copy


def write_commit(folder: Path, manifest: Manifest) -> None:
    """Say that the dataset in a work folder is complete."""
    write_record(folder / COMMIT, manifest.model_dump())


def publish(prefix: str, folder: Path) -> Manifest:
    """Give a dataset that is complete in its work folder its name, from whatever point an earlier try reached.

    An old .idx goes first and the new one comes last, so that no moment shows a dataset of mixed files.
    """
    manifest = Manifest.load(folder / COMMIT)
    new_bin, new_idx = folder / "all.bin", folder / "all.idx"
    with writing(bin_path(prefix)):
        if new_bin.exists():
            for path in (idx_path(prefix), manifest_path(prefix), *(Path(f"{prefix}{end}") for end in BESIDE.values())):
                path.unlink(missing_ok=True)
            fsync_folder(folder.parent)
            os.replace(new_bin, bin_path(prefix))
        for name, ending in BESIDE.items():
            if (folder / name).exists() and (folder / name).stat().st_size:
                os.replace(folder / name, f"{prefix}{ending}")
        manifest.write(prefix)
        if new_idx.exists():
            os.replace(new_idx, idx_path(prefix))
        fsync_folder(folder.parent)
    remove(folder)
    return manifest


def is_complete(folder: Path) -> bool:
    return (folder / COMMIT).exists()


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    write_record(folder / PLAN, plan)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What `write_plan` wrote, as it is read back; None where there is none. Raises UserError for a damaged one."""
    path = folder / PLAN
    remedy = f"delete the folder {folder} and start again"
    return read_record(path, remedy, unbound=True) if path.exists() else None


def begin(folder: Path) -> None:
    """Make a work folder empty. Raises UserError where an unfinished tokenization has tokens in it."""
    if (folder / STATE).exists() or any(folder.glob("*.part")):
        raise UserError(
            f"{folder}: belongs to an unfinished `remit data tokenize`: repeat that command, delete the folder, or "
            "choose another --output"
        )
    empty(folder)


def empty(folder: Path) -> None:
    """Delete everything in a work folder."""
    with writing(folder):
        for path in folder.iterdir():
            _remove(path)


def remove(folder: Path) -> None:
    """Delete a work folder; under its own name it is there whole or not at all."""
    if folder.exists():
        aside = temporary_name(folder)
        with writing(folder):
            os.replace(folder, aside)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
