"""`remit data tokenize`: raw text to a dataset, on all cores, resumable at any moment, the same bytes every time.

The plan (inputs, tokenizer, settings) is written into PREFIX.parts/ first. Workers turn its tasks into parts, this
process joins the parts in order, and a rename at the end makes the dataset appear.
"""

import multiprocessing
import os
import sys
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_prep.assemble import Assembler, holds_tokens
from data_prep.backends import HuggingFace, TokenizerFile, backend_version, choose_backend, clip, limit_threads
from data_prep.cuts import safe_to_cut
from data_prep.folders import OF_THE_CORPUS, count_left_out, describe
from data_prep.inputs import (
    TASK_BYTES,
    Found,
    Input,
    Task,
    check_unchanged,
    expand_inputs,
    plan_tasks,
    take_shard,
    task_size,
)
from data_prep.progress import Meter
from data_prep.readers import read_task
from data_prep.work import (
    as_json,
    check_prefix,
    claimed,
    empty,
    is_complete,
    made_before,
    read_plan,
    same_value,
    work_path,
    write_plan,
)
from data_prep.worker import PART_BYTES, Encoder, Job, Progress, run_task, worker_main
from remit_megatron.data.indexed import dtype_for
from remit_megatron.data.manifest import Manifest
from remit_megatron.errors import RunError, StopRequested, UserError

DOCUMENT_MIB = 64
WHOLE_DOCUMENT_MIB = 2
SAMPLE_TASKS = 8
SAMPLE_DOCUMENTS = 100
SAMPLE_CHARACTERS = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeSettings:
    """What `remit data tokenize` was asked for. See `data_prep.cli` for the meaning of each."""

    inputs: list[str]
    tokenizer: str
    output: str
    workers: int | None = None
    text_key: str = "text"
    append_eod: bool = False
    eod_token: str | None = None
    vocab_size: int | None = None
    text_lines: bool = False
    max_bad: int = 1000
    max_document_mib: int | None = None
    """None: DOCUMENT_MIB; WHOLE_DOCUMENT_MIB where a document is taken whole, with 100 times its size in memory."""
    backend: str = "auto"
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    skip_unknown: bool = False
    task_bytes: int | None = None
    """Of a file of lines, so much is one piece. None: `task_size`."""
    part_bytes: int = PART_BYTES


@dataclass(slots=True)
class Plan:
    """What will be done, and what must be the same when it is done in two goes."""

    job: Job
    inputs: list[Input]
    tasks: list[Task]
    version: str
    why: str
    provenance: dict[str, Any]
    """What the manifest will say of it, but for what is counted on the way."""

    def identity(self) -> dict[str, Any]:
        """What must be the same in two starts of one run."""
        job = self.job
        return {
            "tokenizer": job.tokenizer.hash,
            "backend": self.version,
            "vocab_size": job.vocab_size,
            "eod_id": job.eod_id,
            "text_key": job.text_key,
            "max_document_mib": job.max_document_bytes >> 20,
            "shard": self.provenance["shard"],
            "tasks": [task.record() for task in self.tasks],
        }


def tokenize(settings: TokenizeSettings) -> Manifest:
    """Make the dataset, or go on where an earlier start of the same command stopped.

    Raises UserError for a mistake in the inputs, RunError for a disk or worker that fails, StopRequested for Ctrl-C.
    Each leaves what was done so far on disk, and the same command goes on from there; a mistake that was found before
    any token was made leaves nothing.
    """
    check_prefix(settings.output)
    if settings.eod_token is not None and not settings.append_eod:
        raise UserError(f"--eod-token {settings.eod_token} goes with --append-eod: add it, or leave --eod-token out")
    try:
        found = expand_inputs(settings.inputs, text_lines=settings.text_lines, skip_unknown=settings.skip_unknown)
        file = TokenizerFile.load(settings.tokenizer)
        with claimed(settings.output) as folder:
            return _make(settings, found, file, folder)
    except KeyboardInterrupt:
        folder = work_path(settings.output)
        raise StopRequested(f"{folder}: interrupted; the same command goes on from what is done") from None


def _make(settings: TokenizeSettings, found: Found, file: TokenizerFile, folder: Path) -> Manifest:
    wanted = _wanted(settings, found, file)
    try:
        manifest = made_before(settings.output, folder, wanted, settings.overwrite)
        how = "made by an earlier start of this command"
        if manifest is None:
            plan = _make_plan(settings, found, file, folder, wanted)
            _match_plan(plan)
            manifest, how = _run(settings, plan)
        _say_files(found, manifest)
        return _said(settings, manifest, how)
    except UserError:
        if not is_complete(folder) and not holds_tokens(folder):
            empty(folder)
        raise


def _wanted(settings: TokenizeSettings, found: Found, file: TokenizerFile) -> dict[str, Any]:
    """What the manifest of this command's dataset says, as far as it is known before anything is read."""
    return {
        "command": "tokenize",
        "inputs": [source.provenance() for source in found.inputs],
        "text_key": settings.text_key,
        "max_document_mib": settings.max_document_mib,
        "shard": list(settings.shard) if settings.shard else None,
        "piece_bytes": (settings.task_bytes or task_size(found.inputs)) if settings.shard else None,
        "vocab_size": settings.vocab_size or file.vocab_size,
        "eod_id": file.eod_id(settings.eod_token) if settings.append_eod else None,
        "tokenizer_hash": file.hash,
    }


def _run(settings: TokenizeSettings, plan: Plan) -> tuple[Manifest, str]:
    job = plan.job
    assembler = Assembler(job.folder, len(plan.tasks), dtype_for(job.vocab_size), settings.max_bad)
    workers = min(settings.workers or len(os.sched_getaffinity(0)), len(plan.tasks))
    kinds = Counter(source.kind for source in plan.inputs)
    _say(f"inputs: {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}")
    _say(f"{plan.version}, {workers} workers, {len(plan.tasks)} pieces: {plan.why}")
    meter = Meter(sum(task.size for task in plan.tasks), done=assembler.state.disk_bytes)
    try:
        assembler.advance()
        with meter:
            if workers == 1:
                _run_here(plan, assembler, meter)
            else:
                _run_processes(plan, assembler, meter, workers)
        check_unchanged(plan.inputs)
        manifest = assembler.commit(settings.output, _manifest_identity(plan))
    finally:
        assembler.close()
    return manifest, meter.summary()


def _run_here(plan: Plan, assembler: Assembler, meter: Meter) -> None:
    limit_threads()
    encoder = Encoder(plan.job)
    while not assembler.done:
        number = assembler.state.task
        run_task(plan.job, encoder, number, plan.tasks[number], _resume_point(assembler, number), meter.add)
        assembler.advance()


def _run_processes(plan: Plan, assembler: Assembler, meter: Meter, workers: int) -> None:
    """Hand out tasks in order to worker processes and join the parts as they come."""
    context = multiprocessing.get_context("spawn")
    upcoming = assembler.state.task
    # So far ahead and no further, or one slow task would let the others pile up parts without end.
    ahead = 8 * workers
    processes: dict[Connection, Any] = {}
    idle: list[Connection] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker_main, args=(plan.job, plan.tasks, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        while not assembler.done:
            for pipe in list(wait(list(processes), timeout=1.0)):
                assert isinstance(pipe, Connection)
                if _receive(pipe, processes[pipe], meter) == "ready":
                    idle.append(pipe)
                    assembler.advance()
            while idle and upcoming < min(len(plan.tasks), assembler.state.task + ahead):
                idle.pop().send((upcoming, _resume_point(assembler, upcoming)))
                upcoming += 1
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _resume_point(assembler: Assembler, number: int) -> tuple[int, int | None]:
    state = assembler.state
    return (state.part, state.position) if number == state.task else (0, None)


def _receive(pipe: Connection, process: Any, meter: Meter) -> str | None:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise RunError(
            f"a worker process ended with {process.exitcode} (-9: killed, often for lack of memory); the same command "
            "goes on from what is done, with --workers you can use fewer"
        ) from None
    if isinstance(message, Progress):
        meter.add(message)
        return None
    if isinstance(message, tuple):
        kind, text = message
        raise kind(text)
    return str(message)


def _make_plan(
    settings: TokenizeSettings, found: Found, file: TokenizerFile, folder: Path, wanted: dict[str, Any]
) -> Plan:
    piece_bytes = _piece_bytes(settings, found.inputs, folder)
    tasks = plan_tasks(found.inputs, piece_bytes, settings.text_key)
    if not tasks:
        raise UserError(f"{', '.join(settings.inputs)}: nothing to read, every file is empty")
    if settings.shard:
        tasks = take_shard(tasks, *settings.shard)
    vocab_size = wanted["vocab_size"]
    if vocab_size < file.vocab_size:
        raise UserError(f"--vocab-size {vocab_size} is smaller than the {file.vocab_size} ids of {file.path}")
    asked = settings.max_document_mib or DOCUMENT_MIB
    choice = choose_backend(settings.backend, file, _sample(tasks, settings.text_key, asked << 20))
    mib, why = asked, choice.why
    if (
        settings.max_document_mib is None
        and choice.backend == "tokenizers"
        and not safe_to_cut(file, HuggingFace(file))
    ):
        mib = WHOLE_DOCUMENT_MIB
        why += f"; documents above {mib} MiB are put aside, because it takes them whole: --max-document-mib"
    job = Job(
        folder=folder,
        tokenizer=file,
        backend=choice.backend,
        exact=choice.exact,
        vocab_size=vocab_size,
        eod_id=wanted["eod_id"],
        text_key=settings.text_key,
        max_document_bytes=mib << 20,
        max_bad=settings.max_bad,
        part_bytes=settings.part_bytes,
    )
    version = backend_version(choice.backend)
    left_out, _ = count_left_out([entry for entry in found.left_out if entry.left_out in OF_THE_CORPUS])
    own = ("command", "inputs", "text_key", "max_document_mib", "shard", "piece_bytes")
    provenance = {**{name: wanted[name] for name in own}, "left_out": left_out, "backend": version}
    return Plan(job=job, inputs=found.inputs, tasks=tasks, version=version, why=why, provenance=provenance)


def _piece_bytes(settings: TokenizeSettings, inputs: list[Input], folder: Path) -> int:
    """The size of pieces: that of an unfinished run of an older version, which had one for all, where there is one."""
    if settings.task_bytes is not None:
        return settings.task_bytes
    plan = read_plan(folder)
    if plan is not None and settings.shard is None:
        older = {"tasks": [task.record() for task in plan_tasks(inputs, TASK_BYTES, settings.text_key)]}
        if as_json(older)["tasks"] == plan.get("tasks"):
            return TASK_BYTES
    return task_size(inputs)


def _sample(tasks: list[Task], text_key: str, max_bytes: int) -> list[str]:
    """Documents from pieces spread over the input."""
    chosen = sorted({round(i * (len(tasks) - 1) / max(1, SAMPLE_TASKS - 1)) for i in range(SAMPLE_TASKS)})
    texts: list[str] = []
    size = 0
    for number in chosen:
        if size > SAMPLE_CHARACTERS:
            break
        batch = next(read_task(tasks[number], None, text_key, max_bytes))
        step = max(1, len(batch.texts) // SAMPLE_DOCUMENTS)
        for text in batch.texts[::step]:
            texts.append(clip(text))
            size += len(texts[-1])
    return texts


def _match_plan(plan: Plan) -> None:
    """Write the plan, or compare it with the one that an earlier start wrote."""
    folder, wanted = plan.job.folder, as_json(plan.identity())
    found = read_plan(folder)
    differing = [name for name in wanted if found is None or not same_value(name, found.get(name), wanted[name])]
    if differing and not holds_tokens(folder):  # none yet, or of one that was killed before it had any
        empty(folder)
        write_plan(folder, wanted)
    elif differing:
        what = "the input files or their division" if differing == ["tasks"] else ", ".join(differing)
        raise UserError(
            f"{folder}: belongs to an unfinished run of another kind ({what} differ): repeat that command, delete the "
            "folder, or choose another --output"
        )
    elif any(folder.glob("all.*")):
        _say(f"going on with {folder}")


def _manifest_identity(plan: Plan) -> dict[str, Any]:
    job = plan.job
    read = {task.source.path for task in plan.tasks}
    return {
        "vocab_size": job.vocab_size,
        "eod_id": job.eod_id,
        "tokenizer_hash": job.tokenizer.hash,
        "provenance": {**plan.provenance, "files_read": len(read)},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_files(found: Found, manifest: Manifest) -> None:
    """What became of every file that the names given led to."""
    left_out, examples = count_left_out(found.left_out)
    read = manifest.provenance["files_read"]
    if len(found.inputs) > read:
        without = "without a piece in this shard" if manifest.provenance["shard"] else "empty"
        left_out |= {without: len(found.inputs) - read}
    _say(describe(len(found.inputs) + len(found.left_out), read, left_out, examples))


def _said(settings: TokenizeSettings, manifest: Manifest, how: str) -> Manifest:
    made = manifest.provenance
    bad, empty_ones = made["bad"], made["empty"]
    aside = f", {bad:,} put aside in {settings.output}.bad.jsonl" if bad else ""
    left_out = f", {empty_ones:,} empty left out" if empty_ones else ""
    print(
        f"{settings.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens "
        f"({manifest.dtype}){left_out}{aside}; {how}",
        flush=True,
    )
    return manifest
