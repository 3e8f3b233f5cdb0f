"""What the wheel's folders tell of each stage: done, running, stopped, stale, to do, and why."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.data.files import is_held, locked, write_atomically
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.graph import Node, Plan, Source
from remit_megatron.posttrain.contract import SPEC, WORK, Manifest, first_difference, read_manifest, read_metrics

DONE, RUNNING, STOPPED, STALE, TO_DO = "done", "running", "stopped", "stale", "to do"
LOG = f"{WORK}/log.txt"
RECORD, RECORD_LOCK = "wheel.json", ".wheel.json.lock"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class State:
    """Of one stage."""

    word: str
    why: str = ""


def lock_of(node: Node) -> Path:
    """Beside the stage's folder, which may be moved aside while the lock is held."""
    return node.folder.with_name(f".{node.folder.name}.lock")


def assess(plan: Plan, contents: Contents) -> dict[Path, State]:
    """The state of every stage, by folder. Reads manifests, and of models only those that were there before."""
    names = Record(plan.wheel.folder).stages()
    states: dict[Path, State] = {}
    for node in plan.nodes:
        states[node.folder] = _assess(node, contents, states, names)
    return states


def _assess(node: Node, contents: Contents, states: dict[Path, State], names: dict[str, Any]) -> State:
    lock = lock_of(node)
    if lock.exists() and is_held(lock):
        return State(RUNNING, progress(node))
    manifest = read_manifest(node.folder)
    if manifest is not None:
        for source in node.parents.values():
            if source.node and states[source.node.folder].word != DONE:
                return State(STALE, f"{source.name} is {states[source.node.folder].word}")
        other = another_parent(node, manifest.parents, contents)
        return State(STALE, other) if other else State(DONE)
    recorded = recorded_parents(node.folder)
    if recorded is not None:
        other = another_parent(node, recorded, contents)
        last = last_words(node.folder / LOG)
        return State(STALE, other) if other else State(STOPPED, ", ".join(filter(None, (progress(node), last))))
    for name in node.names:
        if name in names and names[name]["key"] != node.key:
            return State(STALE, changed(names[name]["parts"], node))
    return State(TO_DO)


def changed(before: dict[str, Any], node: Node) -> str:
    """Why a stage of this name has another key than the one before."""
    found = first_difference(before.get("settings"), node.parts["settings"])
    if found:
        return f"changed: {found.replace(' there, ', ' before, ').removesuffix(' here')}"
    data = node.parts["data"]
    known = list(before.get("data", {}).values())
    other = [path for i, (path, sha) in enumerate(data.items()) if known[i : i + 1] != [sha]]
    if other or len(known) != len(data):
        return f"data changed: {', '.join(other) or 'a file less'}"
    theirs = before.get("parents", {})
    other = [source.name for role, source in node.parents.items() if theirs.get(role) != source.key]
    return f"follows {', '.join(other)}" if other else "changed"


def identity_now(source: Source, contents: Contents) -> str | None:
    """Of the model that a source names, by its manifest; None where it is not there yet."""
    if source.node is None:
        return contents.model(source.path, source.name)
    manifest = read_manifest(source.node.folder)
    if manifest is None:
        return None
    return manifest.kept.get(source.kept) if source.kept else manifest.identity


def another_parent(node: Node, recorded: dict[str, str], contents: Contents) -> str | None:
    """Which of the models that a stage was made from is another one by now; None: they are all the same."""
    for role, source in node.parents.items():
        if recorded.get(role) != identity_now(source, contents):
            return f"{source.name} is another model now"
    return None


def recorded_parents(folder: Path) -> dict[str, str] | None:
    """What an unfinished stage was begun with; None where it was not begun. Raises DamagedError naming the file."""
    try:
        content = json.loads((folder / SPEC).read_text())
        return {str(role): str(identity) for role, identity in content["parents"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{folder / SPEC}: cannot be read ({error}): remove {folder} to begin it again") from None


def metrics(node: Node) -> list[dict[str, Any]]:
    """Lines of a stage's metrics.jsonl, also of mid-training that is under way."""
    run = node.folder / WORK / "run"
    return read_metrics(node.folder) or read_metrics(run)


def progress(node: Node) -> str:
    lines = metrics(node)
    return f"step {lines[-1].get('step')}" if lines else ""


def last_words(log: Path) -> str:
    """The last line by which a program of ours said why it stopped."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.removeprefix("remit: ") for line in lines[-50:] if line.startswith("remit: ")]
    return said[-1][:300] if said else ""


def finished(node: Node) -> Manifest:
    """Raises UserError for a stage that is not."""
    manifest = read_manifest(node.folder)
    if manifest is None:
        raise UserError(f"{node.name} is not finished")
    return manifest


class Record:
    """wheel.json of the wheel's folder: whose folder it is, and which key each stage had when it was last begun."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / RECORD

    def stages(self) -> dict[str, Any]:
        stages: dict[str, Any] = self._read().get("stages", {})
        return stages

    def file(self) -> str | None:
        """The wheel's file."""
        found = self._read().get("file")
        return None if found is None else str(found)

    def claim(self, file: Path) -> None:
        """Make the folder the wheel's of this file. Raises UserError where it is another's, or holds something else."""
        with locked(self.folder / RECORD_LOCK):
            content = self._read()
            owner = content.get("file")
            if owner is None and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise UserError(f"wheel = '{self.folder}': is not empty and holds no wheel: name another folder")
            if owner not in (None, str(file.resolve())) and Path(owner).exists():
                raise UserError(f"wheel = '{self.folder}' is the wheel of {owner}: name another folder in {file}")
            self._write({**content, "file": str(file.resolve())})

    def begin(self, node: Node) -> None:
        """Remember the key of a stage under all of its names."""
        with locked(self.folder / RECORD_LOCK):
            content = self._read()
            stages = content.get("stages", {})
            stages |= {name: {"key": node.key, "parts": node.parts} for name in node.names}
            self._write({**content, "stages": stages})

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            return dict(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{self.path}: cannot be read ({error}): remove it; no stage is lost") from None

    def _write(self, content: dict[str, Any]) -> None:
        write_atomically(self.path, (json.dumps({"format": FORMAT, **content}, indent=1) + "\n").encode())
