"""Scores on their way from a scorer to the run that uses them: a folder that both can reach, and no other link.

FOLDER/run.json               by the run: what its scores must be, and the step that it needs next
FOLDER/.run.lock              held by the run: one folder serves one run at a time
FOLDER/scorer.json            by the scorer: what its scores are, a counter that moves with its work, what is ready
FOLDER/step-00000012.scores   by the scorer, which also removes it: SHA-256, ids of the samples, a row for each of them

Each file has one writer, which replaces it whole; so there is nothing to lock, and a killed writer leaves the old one.
Nothing depends on the hosts' clocks: a reader measures, with its own, how long the counter has stood still. Nothing is
found by listing the folder or by asking for a file that may not exist yet, since a network file system answers both
from its memory for up to a minute: a step's file is opened after scorer.json has named it. scorer.json and run.json
may be awaited; their readers write in the same folder meanwhile, which makes the file system look again.
"""

import contextlib
import hashlib
import json
import os
import struct
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from remit_megatron.data.files import clear_dead, is_held, temporary_name, writing
from remit_megatron.errors import UserError
from remit_megatron.outside import read_bytes
from remit_megatron.scores.manifest import CacheManifest, first_difference
from remit_megatron.scores.record import queued_row

KEY = "reference.queue"
RUN_LOCK = ".run.lock"
MAGIC = b"RMQUEUE1"
HEADER = struct.Struct("<8sQII32s32s")
BEAT_S = 0.5
"""How often at least an idle scorer moves its counter."""
REREAD_S = 1.0
"""How long a file that is named and cannot be read is tried again: the scorer may just be replacing it."""

SampleNumber = tuple[int, int]


class QueueManifest(BaseModel):
    """What decides a step's scores, and which samples it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    scores: CacheManifest
    weights: tuple[float, ...]
    """Of the sources, as data.train has them."""
    step_samples: int = Field(ge=1)
    train_steps: int = Field(ge=1)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).digest()

    def difference(self, other: "QueueManifest") -> str | None:
        """The first thing in which the scores of two sides differ, in words; None where they are the same."""
        found: Any = first_difference(self.scores, other.scores)
        for name, words in (
            ("weights", "the weights of data.train"),
            ("step_samples", "the samples a step"),
            ("train_steps", "the number of steps"),
        ):
            found = found or (
                (words, getattr(self, name), getattr(other, name))
                if getattr(self, name) != getattr(other, name)
                else None
            )
        if found:
            return f"{found[0]} ({found[1]} there, {found[2]} here)"
        tokenizer = {"tokenizer": other.scores.tokenizer}  # of two names one tokenizer by now
        renamed = self.model_copy(update={"scores": self.scores.model_copy(update=tokenizer)})
        return None if renamed == other else "the datasets of data.train"


class RunState(NamedTuple):
    """What run.json says."""

    name: str
    """Of this start of the run, drawn then."""
    manifest: QueueManifest
    position: Annotated[int, Field(ge=1)]
    """The step whose scores the run needs next."""
    done: bool


class ScorerState(NamedTuple):
    """What scorer.json says."""

    manifest: QueueManifest
    name: str
    """Of this scorer, drawn at its start."""
    beat: int
    ready: tuple[int, ...]
    """Steps whose files may be opened."""
    ended: bool


S = TypeVar("S", RunState, ScorerState)
RUN_STATE, SCORER_STATE = TypeAdapter(RunState), TypeAdapter(ScorerState)


class Look(NamedTuple):
    """What a run finds when it looks for a step's scores: `scores`, or with neither a reason to do without them, or
    with `wait` to look again."""

    scores: np.ndarray | None = None
    wait: bool = False
    reason: str | None = None


class RunSide:
    """The run's end of a queue, on one rank."""

    def __init__(
        self, folder: Path, manifest: QueueManifest, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ):
        self.folder = folder
        self.manifest = manifest
        self.timeout_s = timeout_s
        self._name = uuid.uuid4().hex
        self._clock = clock
        self._state: ScorerState | None = None
        self._moved_s = float("-inf")
        self._unreadable: tuple[int, float] | None = None

    def publish(self, position: int, *, done: bool = False) -> None:
        """Say which step is needed next. Raises RunError where the folder cannot be written."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": self._name,
            "manifest": self.manifest.model_dump(mode="json"),
            "position": position,
            "done": done,
        }
        _replace(self.folder / "run.json", json.dumps(content).encode())

    def look(self, step: int, samples: Sequence[SampleNumber]) -> Look:
        """A step's scores, as `write_step` was given them, if they are there. Raises UserError where they are of other
        samples."""
        state, now = _read_scorer(self.folder) or self._state, self._clock()
        if state is None:
            return Look(reason="no scorer has come yet")
        if self._state is None or state[1:] != self._state[1:]:
            self._state, self._moved_s = state, now
        different = state.manifest.difference(self.manifest)
        if different:
            return Look(reason=f"the scorer in {self.folder} makes other scores: {different}")
        if step in state.ready:
            scores = self._read(step, samples, state.manifest)
            if scores is not None:
                return Look(scores=scores)
            if self._unreadable is None or self._unreadable[0] != step:
                self._unreadable = step, now
            if now - self._unreadable[1] > REREAD_S:
                return Look(reason=f"{_path(self.folder, step)} was damaged or removed")
            return Look(wait=True)
        if state.ended:
            return Look(reason="the scorer has ended")
        still_s = now - self._moved_s
        return (
            Look(wait=True)
            if still_s <= self.timeout_s
            else Look(reason=f"the scorer has not moved for {still_s:.0f} s")
        )

    def _read(self, step: int, samples: Sequence[SampleNumber], written: QueueManifest) -> np.ndarray | None:
        """written: what the scorer says of its scores, which may name the tokenizer otherwise."""
        found = read_step(self.folder, step, written)
        if found is None:
            return None
        ids, scores = found
        if ids.tolist() != [list(one) for one in samples]:
            raise UserError(
                f"{KEY}: {_path(self.folder, step)} has scores of other samples than this run's step {step}: start the "
                "scorer with the run's own recipe"
            )
        return scores


class ScorerSide:
    """The scorer's end of a queue, on one rank. Its counter moves with its work, so that one that hangs is noticed."""

    def __init__(self, folder: Path, manifest: QueueManifest, ahead_steps: int):
        """Go on with what another scorer has left of the same scores; the rest is removed.

        A run that had ended before is not the one to follow, nor one that was killed and had other scores.
        """
        self.folder = folder
        self.manifest = manifest
        self.ahead_steps = ahead_steps
        self._name, self._beat, self._beaten_s = uuid.uuid4().hex, 0, float("-inf")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        run = _read_run(folder)
        over = run and (run.done or (run.manifest.difference(manifest) and not is_held(folder / RUN_LOCK)))
        self._over = run.name if run and over else None
        found = _steps(folder)
        self._ready = {step for step in found if read_step(folder, step, manifest) is not None}
        clear_scores(folder, keep=self._ready)

    def next(self) -> tuple[int | None, bool]:
        """(step to be scored now, or None where there is none; whether the run is done). Beats.

        Raises UserError where the run wants other scores than this scorer makes.
        """
        run = _read_run(self.folder)
        if run is None or run.name == self._over:
            self.beat()
            return None, False
        different = run.manifest.difference(self.manifest)
        if different:
            raise UserError(
                f"{KEY}: the run of {self.folder} needs other scores than this recipe's: {different}: start the scorer "
                "with the run's own recipe"
            )
        first, last = run.position, min(run.position + self.ahead_steps - 1, self.manifest.train_steps)
        self._remove([step for step in self._ready if not first <= step <= last])
        self.beat()
        return next((step for step in range(first, last + 1) if step not in self._ready), None), run.done

    def announce(self, step: int) -> None:
        """The file of a step, by `write_step`, is there."""
        self._ready.add(step)
        self.beat(at_once=True)

    def beat(self, *, at_once: bool = False, ended: bool = False) -> None:
        """Show that the work goes on: on disk every BEAT_S, or at once."""
        now = time.monotonic()
        if not (at_once or ended) and now - self._beaten_s < BEAT_S:
            return
        self._beat, self._beaten_s = self._beat + 1, now
        content = {
            "manifest": self.manifest.model_dump(mode="json"),
            "name": self._name,
            "beat": self._beat,
            "ready": sorted(self._ready),
            "ended": ended,
        }
        _replace(self.folder / "scorer.json", json.dumps(content).encode())

    def _remove(self, steps: Any) -> None:
        for step in list(steps):
            self._ready.discard(step)
            with contextlib.suppress(OSError):
                _path(self.folder, step).unlink()


def clear_scores(folder: Path, keep: Collection[int] = ()) -> None:
    """Remove the steps' files, but those of `keep`, and what killed writers have left. For the only scorer."""
    unfinished = folder.glob(".step-*.tmp")  # no other is alive that could be writing them
    for path in (*(_path(folder, step) for step in _steps(folder) if step not in keep), *unfinished):
        with contextlib.suppress(OSError):
            path.unlink()
    clear_dead(folder)


def _steps(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in folder.glob(f"step-{'[0-9]' * 8}.scores")]


def write_step(
    folder: Path, step: int, manifest: QueueManifest, samples: Sequence[SampleNumber], scores: np.ndarray
) -> None:
    """scores: NLL [n, s] float32, or records [n] of `record.queued_row`. Raises RunError where the disk refuses."""
    row = queued_row(manifest.scores)
    scores = np.asarray(scores, dtype=row.base)
    assert scores.shape[1:] == row.shape, f"{scores.shape[1:]} is not the shape of a sample's scores, {row.shape}"
    payload = np.asarray(samples, dtype="<i8").tobytes() + scores.tobytes()
    header = HEADER.pack(
        MAGIC, step, len(scores), manifest.scores.sequence_length, manifest.digest, hashlib.sha256(payload).digest()
    )
    _replace(_path(folder, step), header + payload)


def read_step(folder: Path, step: int, manifest: QueueManifest) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids [n, 2] int64, scores as `write_step` takes them) of a step; None where the file is absent, damaged or of
    other scores."""
    try:
        content = _path(folder, step).read_bytes()
        magic, number, samples, length, digest, checksum = HEADER.unpack_from(content)
    except (OSError, struct.error):
        return None
    payload = memoryview(content)[HEADER.size :]
    row, wanted = queued_row(manifest.scores), (MAGIC, step, manifest.digest, manifest.scores.sequence_length)
    fits = (magic, number, digest, length) == wanted and len(payload) == samples * (16 + row.itemsize)
    if not fits or hashlib.sha256(payload).digest() != checksum:
        return None
    ids = np.frombuffer(payload, dtype="<i8", count=2 * samples).reshape(samples, 2)
    scores = np.frombuffer(payload, dtype=row.base, offset=16 * samples)
    return ids, scores.reshape(samples, *row.shape)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.scores"


def _read_run(folder: Path) -> RunState | None:
    return _read(folder / "run.json", RUN_STATE)


def _read_scorer(folder: Path) -> ScorerState | None:
    return _read(folder / "scorer.json", SCORER_STATE)


def _read(path: Path, kind: TypeAdapter[S]) -> S | None:
    """None where the file is absent or damaged, or the file system has lost it while it was replaced."""
    try:
        return kind.validate_json(read_bytes(path), strict=True)
    except (UserError, ValidationError):
        return None


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, for readers. Not made to survive a power cut: what is lost then is scored again."""
    temporary = temporary_name(path)
    with writing(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
