"""Joins parts in order into one dataset while workers go on, keeping its place on disk.

The output grows in the work folder; `state.json` says how much of it is certain. After a crash the files are cut back
to that, so the result does not depend on interruptions. Parts are deleted once they are certain, so that the disk holds
the tokens once, not twice.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.parts import Footer, part_path, read_footer
from data_prep.worker import describe_bad, too_many_bad
from data_prep.writer import BlockHasher, publish, write_index
from remit_megatron.data.files import close_quietly, write_atomically, writing
from remit_megatron.data.manifest import Manifest, tool_name
from remit_megatron.errors import RunError, UserError

CHECKPOINT_BYTES = 1 << 30
COPY_BYTES = 1 << 20
STATE = "state.json"
COUNTS = ("num_tokens", "num_documents", "num_empty", "num_bad", "size", "disk_bytes", "bin_bytes", "bad_bytes")


@dataclass(slots=True)
class State:
    """How much of the output is certain."""

    task: int = 0
    """The task whose part comes next."""
    part: int = 0
    position: int | None = None
    """Where that task goes on; none: at its beginning."""
    num_tokens: int = 0
    num_documents: int = 0
    largest_id: int = 0
    num_empty: int = 0
    num_bad: int = 0
    size: int = 0
    disk_bytes: int = 0
    bin_bytes: int = 0
    bad_bytes: int = 0
    blocks: list[str] = field(default_factory=list)
    """SHA-256 of the full blocks of .bin so far."""


class Assembler:
    """Appends parts in order. Use: `advance` as often as parts may have come, `commit` at the end."""

    def __init__(self, folder: Path, num_tasks: int, dtype: np.dtype, max_bad: int) -> None:
        """Continue from the state in `folder`, or begin. Raises RunError where files cannot be written."""
        self.folder = folder
        self.num_tasks = num_tasks
        self.dtype = dtype
        self.max_bad = max_bad
        self.paths = {name: folder / f"all.{name}" for name in ("bin", "len", "bad")}
        self._state_path = folder / STATE
        self.state = State(**json.loads(self._state_path.read_text())) if self._state_path.exists() else State()
        self.hasher = BlockHasher()
        self.hasher.finished = list(self.state.blocks)
        self._uncertain: list[Path] = []
        self._uncertain_bytes = 0
        sizes = {"bin": self.state.bin_bytes, "len": 4 * self.state.num_documents, "bad": self.state.bad_bytes}
        self._files: dict[str, IO[bytes]] = {}
        for name, path in self.paths.items():
            with writing(path):
                path.touch()
                if path.stat().st_size < sizes[name]:
                    raise RunError(f"{path}: shorter than its journal says; delete the folder {folder} and start again")
                self._files[name] = open(path, "r+b")  # noqa: SIM115 - closed by close
                self._files[name].truncate(sizes[name])
                self._files[name].seek(sizes[name])
        self._hash_unfinished_block()

    def _hash_unfinished_block(self) -> None:
        with open(self.paths["bin"], "rb") as file:
            file.seek(len(self.hasher.finished) * self.hasher.block_bytes)
            while piece := file.read(COPY_BYTES):
                self.hasher.update(memoryview(piece))

    @property
    def done(self) -> bool:
        return self.state.task == self.num_tasks

    def advance(self) -> None:
        """Append every part that is next in order. Raises UserError where more documents are bad than allowed."""
        while not self.done:
            path = part_path(self.folder, self.state.task, self.state.part)
            footer = read_footer(path)
            if footer is None:
                return
            self._append(path, footer)
            if self._uncertain_bytes >= CHECKPOINT_BYTES:
                self.checkpoint()

    def _append(self, path: Path, footer: Footer) -> None:
        with open(path, "rb") as part, writing(self.paths["bin"]):
            self._copy(part, footer.bin_bytes, "bin")
            self._copy(part, 4 * footer.num_documents, "len")
            self._copy(part, footer.bad_bytes, "bad")
        state = self.state
        for name in COUNTS:
            setattr(state, name, getattr(state, name) + getattr(footer, name))
        state.largest_id = max(state.largest_id, footer.largest_id)
        state.task, state.part = (state.task + 1, 0) if footer.last else (state.task, state.part + 1)
        state.position = None if footer.last else footer.position
        self._uncertain.append(path)
        self._uncertain_bytes += footer.bin_bytes
        if state.num_bad > self.max_bad:
            self._files["bad"].flush()
            with open(self.paths["bad"], "rb") as file:
                raise too_many_bad(state.num_bad, self.max_bad, json.loads(file.readline()))

    def _copy(self, part: IO[bytes], size: int, name: str) -> None:
        while size:
            piece = part.read(min(size, COPY_BYTES))
            assert piece, "a part is shorter than its footer says"
            self._files[name].write(piece)
            if name == "bin":
                self.hasher.update(memoryview(piece))
            size -= len(piece)

    def checkpoint(self) -> None:
        """Make everything appended so far certain, then delete its parts."""
        with writing(self.paths["bin"]):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        self.state.blocks = list(self.hasher.finished)
        write_atomically(self._state_path, json.dumps(asdict(self.state)).encode())
        for path in self._uncertain:
            path.unlink(missing_ok=True)
        self._uncertain, self._uncertain_bytes = [], 0

    def _example(self) -> str:
        with open(self.paths["bad"], "rb") as file:
            line = file.readline()
        return f"; for example {describe_bad(json.loads(line))}" if line else ""

    def close(self) -> None:
        """Close the files. What no checkpoint made certain may be lost, and is written again by the next start."""
        for file in self._files.values():
            close_quietly(file)

    def commit(self, prefix: str, identity: dict[str, Any]) -> Manifest:
        """Write .idx and the manifest, and publish all under `prefix`. Raises UserError where there is no token.

        `identity`: vocab_size, eod_id, tokenizer_hash and provenance of the manifest.
        """
        assert self.done, "parts are missing"
        self.checkpoint()
        self.close()
        state = self.state
        if not state.num_tokens:
            raise UserError(
                f"{prefix}: no token to write: {state.num_empty} documents are empty, {state.num_bad} could not be read"
                f"{self._example()}"
            )
        idx_part = self.folder / "all.idx"
        with writing(idx_part):
            idx_sha256 = write_index(idx_part, self.paths["len"], self.dtype, state.num_documents)
        identity["provenance"] = {**identity["provenance"], "empty": state.num_empty, "bad": state.num_bad}
        manifest = Manifest(
            tool=tool_name(),
            dtype=self.dtype.name,
            num_tokens=state.num_tokens,
            num_documents=state.num_documents,
            num_sequences=state.num_documents,
            largest_id=state.largest_id,
            bin_bytes=state.bin_bytes,
            block_bytes=self.hasher.block_bytes,
            bin_sha256=self.hasher.digests(),
            idx_sha256=idx_sha256,
            **identity,
        )
        write_atomically(self.folder / "commit.json", manifest.model_dump_json().encode())
        return finish(prefix, self.folder)


def finish(prefix: str, folder: Path) -> Manifest:
    """Publish a dataset that is complete in its work folder, from whatever point an earlier try reached."""
    manifest = Manifest.model_validate_json((folder / "commit.json").read_bytes())
    bad, target = folder / "all.bad", Path(f"{prefix}.bad.jsonl")
    with writing(target):
        if bad.exists() and bad.stat().st_size:
            os.replace(bad, target)
        elif bad.exists():
            target.unlink(missing_ok=True)
    publish(prefix, folder / "all.bin", folder / "all.idx", manifest)
    remove_folder(folder)
    return manifest


def holds_tokens(folder: Path) -> bool:
    """Whether a work folder has anything that would have to be made again."""
    journal = folder / STATE
    if journal.exists() and State(**json.loads(journal.read_text())).num_tokens:
        return True
    footers = (read_footer(path) for path in folder.glob("*.part"))
    return any(footer is not None and footer.num_tokens for footer in footers)


def remove_folder(folder: Path) -> None:
    """Delete a work folder; under its own name it is there whole or not at all."""
    finished = Path(f"{folder}.done")
    if folder.exists():
        if finished.exists():
            shutil.rmtree(finished)
        os.replace(folder, finished)
    if finished.exists():
        shutil.rmtree(finished)
