"""Joins parts in order into one dataset while workers go on, keeping its place on disk.

The output grows in the work folder; `state.json` says how much of it is certain, and has checksums of it. After a crash
the files are cut back to that, so the result does not depend on interruptions. Parts are deleted once they are certain,
so that the disk holds the tokens once, not twice.
"""

import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.parts import COPY_BYTES, Footer, is_whole, part_path, read_footer
from data_prep.work import STATE, publish, write_commit
from data_prep.worker import describe_bad, too_many_bad
from data_prep.writer import BlockHasher, write_index
from remit_megatron.data.checksums import read_record, write_record
from remit_megatron.data.files import close_quietly, writing
from remit_megatron.data.manifest import Manifest, tool_name
from remit_megatron.errors import RunError, UserError

CHECKPOINT_BYTES = 1 << 30
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
    sums: dict[str, str] | None = None
    """SHA-256 of the block of .bin that is not full, CRC-32 of the other files; None in what older versions wrote."""


class Assembler:
    """Appends parts in order. Use: `advance` as often as parts may have come, `commit` at the end."""

    def __init__(self, folder: Path, num_tasks: int, dtype: np.dtype, max_bad: int) -> None:
        """Continue from the state in `folder`, or begin. Raises RunError where files cannot be written."""
        self.folder = folder
        self.num_tasks = num_tasks
        self.dtype = dtype
        self.max_bad = max_bad
        self.paths = {name: folder / f"all.{name}" for name in ("bin", "len", "bad")}
        self.state = read_state(folder)
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
        self._crc32 = dict.fromkeys(("len", "bad"), 0)
        for name in self.paths:
            self._read_again(name)
        if self.state.sums not in (None, self._sums()):
            raise RunError(f"{folder}: what is done has changed on the disk; delete the folder and start again")
        self._drop_damaged_parts()

    def _read_again(self, name: str) -> None:
        """Go over what an earlier start wrote: checksums cannot be continued, only made anew."""
        with open(self.paths[name], "rb") as file:
            if name == "bin":
                file.seek(len(self.hasher.finished) * self.hasher.block_bytes)
            while piece := file.read(COPY_BYTES):
                self._count(name, piece)

    def _count(self, name: str, piece: bytes) -> None:
        if name == "bin":
            self.hasher.update(memoryview(piece))
        else:
            self._crc32[name] = zlib.crc32(piece, self._crc32[name])

    def _sums(self) -> dict[str, str]:
        """Of what the checksums of full blocks do not cover."""
        unfinished = self.hasher.digests()[len(self.hasher.finished) :]
        return {"bin": unfinished[0] if unfinished else "", **{k: f"{v:08x}" for k, v in self._crc32.items()}}

    def _drop_damaged_parts(self) -> None:
        """Parts are made again where they are not what a worker wrote. To be done before workers look for them."""
        for path in sorted(self.folder.glob("*.part")):
            if not is_whole(path):
                print(f"{path}: damaged, or of another version: made again", file=sys.stderr, flush=True)
                with writing(path):
                    path.unlink()

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
        if not is_whole(path):
            raise RunError(f"{path}: changed on the disk after it was written; start the same command again")
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
            self._count(name, piece)
            size -= len(piece)

    def checkpoint(self) -> None:
        """Make everything appended so far certain, then delete its parts."""
        with writing(self.paths["bin"]):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        self.state.blocks = list(self.hasher.finished)
        self.state.sums = self._sums()
        write_record(self.folder / STATE, asdict(self.state))
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
        write_commit(self.folder, manifest)
        return publish(prefix, self.folder)


def read_state(folder: Path) -> State:
    """How far the work in a folder has come. Raises UserError for a damaged journal."""
    path = folder / STATE
    if not path.exists():
        return State()
    remedy = f"delete the folder {folder} and start again"
    try:
        return State(**read_record(path, remedy, unbound=True))
    except TypeError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None


def holds_tokens(folder: Path) -> bool:
    """Whether a work folder has anything that would have to be made again."""
    if read_state(folder).num_tokens:
        return True
    footers = (read_footer(path) for path in folder.glob("*.part"))
    return any(footer is not None and footer.num_tokens for footer in footers)
