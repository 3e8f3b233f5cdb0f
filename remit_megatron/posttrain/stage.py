"""One stage from its request to its manifest: the engine in a process of its own, and what it left, checked."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from remit_megatron.data.files import locked, write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.posttrain import output
from remit_megatron.posttrain.chat import make_input
from remit_megatron.posttrain.contract import (
    KEEP,
    MODEL,
    WORK,
    Manifest,
    StageSpec,
    as_json,
    checksum_folder,
    data_files,
    keep_name,
    last_figures,
    model_identity,
    read_manifest,
    read_metrics,
    read_spec,
    write_manifest,
)
from remit_megatron.posttrain.engines import Workers, run_engine

DONE = "engine-done"
"""In work/: the engine ended well, and is not to run again."""


def run_stage(folder: Path, workers: Workers | None = None) -> None:
    """Run the stage whose request is in the folder, or go on with it; nothing happens where it is finished.

    workers: engine processes that are kept for the next stage; None: one for this stage only. Raises UserError for a
    request that cannot be met (before anything is trained, wherever that can be known) or an output that does not do
    as a model, RunError for an engine that failed, StopRequested after a signal: the same call goes on.
    """
    spec = read_spec(folder)
    if read_manifest(folder) is not None:
        return
    with locked(folder / ".lock", f"{folder}: another process runs this stage: wait for it or stop it"):
        if read_manifest(folder) is not None:  # by a process that has ended since
            return
        work = folder / WORK
        with writing(work):
            work.mkdir(exist_ok=True)
        with Stopwatch(work / "seconds") as clock:
            _check_data(spec)
            given = make_input(spec, work / "in")
            if not (work / DONE).exists():
                run_engine(folder, spec, workers)
                write_atomically(work / DONE, b"")
            kept = _accept(folder, spec, given)
            files = checksum_folder(folder / MODEL)
            lines = read_metrics(folder)
            manifest = Manifest(
                name=spec.name,
                kind=spec.kind,
                identity=model_identity(files),
                files=as_json(files),
                kept=kept,
                parents=spec.parents,
                seconds=round(clock.read(), 1),
                steps=max((line.get("step", 0) for line in lines), default=0),
                last=last_figures(lines),
                versions=output.read_versions(work),
            )
        write_manifest(folder, manifest)
        _clear(work)


def _check_data(spec: StageSpec) -> None:
    for asked, found in zip(spec.data, data_files(file.path for file in spec.data), strict=True):
        if asked.sha256 != found.sha256:
            raise UserError(f"data: {asked.path}: its content is not what stage {spec.name} was asked for")


def _accept(folder: Path, spec: StageSpec, given: Path) -> dict[str, str]:
    """Put the engine's models in their places, each checked first; the identities of the kept ones by folder."""
    made = folder / WORK / KEEP
    wanted = {keep_name(share) for share in spec.keep}
    found = {path.name for path in made.iterdir()} if made.is_dir() else set()
    lacking = sorted(name for name in wanted - found if not (folder / KEEP / name).is_dir())
    if lacking:
        raise UserError(f"{made}: the engine kept no model at {', '.join(lacking)}, which `keep` asks for")
    for name in sorted(wanted & found):
        output.accept(made / name, folder / KEEP / name, given)
    output.accept(folder / WORK / "out", folder / MODEL, given)
    return {name: model_identity(checksum_folder(folder / KEEP / name)) for name in sorted(wanted)}


def _clear(work: Path) -> None:
    """Drop the optimizer states: nobody goes on from them. Logs stay."""
    for path in work.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


class Stopwatch:
    """Seconds of all tries of a stage, kept in a file; a try that was killed is not in them."""

    def __init__(self, path: Path):
        self._path = path
        self._before, self._began = 0.0, time.monotonic()

    def __enter__(self) -> "Stopwatch":
        with suppress(OSError, ValueError):
            self._before = float(self._path.read_text())
        return self

    def read(self) -> float:
        return self._before + time.monotonic() - self._began

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):  # a full disk costs the figure, and hides no error
            self._path.write_text(f"{self.read():.1f}\n")
