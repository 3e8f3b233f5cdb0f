"""`remit status`: what a run does, how far it is and why it was restarted, from its folder and whoever runs it.

`python -m launch.status RUN --failed REASON` is for job scripts: it writes into status.json why a job gives up.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import orjson

from launch.backends import BACKENDS
from launch.backends.base import Life
from launch.record import (
    Event,
    LaunchFile,
    StatusFile,
    mark_failed,
    read_events,
    read_file,
    read_status,
    shown,
)
from launch.run_folder import lock_is_held
from remit_megatron.errors import RemitError, UserError

OUTCOMES = {"end": "ended", "requeue": "queued again", "preempted": "preempted"}
UNDER_WAY = ("starting", "running")
"""States of status.json that are no end."""
SILENT_S = 300
"""A run that says it runs and has not written for so long gets a remark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What the files of a run folder tell."""

    run: Path
    status: StatusFile | None
    events: list[Event]
    launched: LaunchFile | None

    @property
    def job(self) -> str | None:
        return self.status.job if self.status else None

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None

    def life(self) -> Life | None:
        """Whether its processes are there: one holds the lock, or the place where they should be knows."""
        if lock_is_held(self.run):
            return Life.LIVES
        name = self.launched.backend if self.launched else None
        if name is None:  # started by hand, or by a version that did not write it down
            name = "slurm" if self.events or self.job or (self.run / "job.sbatch").exists() else "local"
        if name not in BACKENDS:
            return None
        jobs = [*(self.launched.jobs if self.launched else ()), *([self.job] if self.job else ())]
        jobs += [self.last.start.partition(".")[0]] if self.last else []
        jobs = [job for job in dict.fromkeys(jobs) if job.isascii() and job.isdigit()]
        return BACKENDS[name].status(self.run, jobs, self.status.host if self.status else None)


def report(run: Path, now_unix_s: float | None = None) -> str:
    """The text of `remit status`. Raises UserError for a folder that holds no run."""
    if not (run / "recipe.toml").exists() and not (run / "status.json").exists():
        raise UserError(f"{run}: no run here: name the folder that a recipe's `run` names")
    now = time.time() if now_unix_s is None else now_unix_s
    told, remarks = _read(run)
    lines = [f"{run}", *_state(told, now), *(f"            {remark}" for remark in remarks)]
    if told.status and told.status.step is not None:
        lines += _progress(told.status)
    lines += [*_skipped(run), *_restarts(told.events)]
    return "\n".join(lines)


def _read(run: Path) -> tuple[_Told, list[str]]:
    """And a remark for each file that cannot be used: a crash of the machine can leave it empty."""
    status, events, launched = None, list[Event](), None
    remarks = []
    try:
        status = read_status(run)
    except UserError as error:
        remarks.append(str(error))
    try:
        events = read_events(run)
    except UserError as error:
        remarks.append(str(error))
    try:
        launched = read_file(run / "launch.json", LaunchFile)
    except UserError as error:
        remarks.append(str(error))
    return _Told(run=run, status=status, events=events, launched=launched), remarks


def _state(told: _Told, now: float) -> list[str]:
    if told.status is None:
        return _before_any_status(told)
    status, last = told.status, told.last
    state = shown(status.state or "unknown")
    if last and _outlived(status, last):
        return [f"state       {_outcome(last)}", f"job         {_named(last)}; its ranks had last said: {state}"]
    claimed = _claimed(told, state)
    lines = [f"state       {claimed}"]
    where = shown(status.host or "no rank has got as far as saying where it is")
    if status.job:
        where = f"job {shown(status.job)}.{status.restart or 0} on {where}"
    age = max(0.0, now - (status.updated_unix_s or now))
    lines.append(f"where       {where}, last word {_duration(age)} ago")
    if claimed in UNDER_WAY and age > SILENT_S:
        lines.append(f"            no word for {_duration(age)}: see the newest folder of {told.run / 'logs'}")
    if last and last.name != "start" and last.unix_s >= (status.started_unix_s or 0):
        lines.append(f"job         {_named(last)}: {shown(last.detail)}")
    return lines


def _claimed(told: _Told, state: str) -> str:
    """A state of status.json, if it can be: who was killed has not written that it ended."""
    assert told.status is not None
    if state in UNDER_WAY:
        life = told.life()
        if life is Life.GONE:
            return f"ended without a last word: killed, or its node was lost; it had last said: {state}"
        if life is Life.WAITS:
            return f"waits to start again; it had last said: {state}"
        if life is None and lock_is_held(told.run) is False:
            host = shown(told.status.host or "its host")
            return f"unknown: it had last said: {state}; nothing here holds {told.run / '.lock'}, {host} would know"
    text = state + (f" (exit code {told.status.exit_code})" if told.status.exit_code is not None else "")
    return text + (f": {shown(told.status.reason)}" if told.status.reason else "")


def _before_any_status(told: _Told) -> list[str]:
    last = told.last
    if last and last.name != "start":
        return [f"state       {_outcome(last)}", f"job         {_named(last)}"]
    life = told.life()
    if last:
        gone = "ended without a last word: killed, or its node was lost"
        return [f"state       {gone if life is Life.GONE else 'starting'}: job {shown(last.start)}"]
    if life is Life.GONE and told.launched and told.launched.jobs:
        return [f"state       has not started, and never will: job {shown(', '.join(told.launched.jobs))} is gone"]
    return [f"state       {'waits for SLURM' if (told.run / 'job.sbatch').exists() else 'has not started'}"]


def _named(event: Event) -> str:
    return f"{shown(event.start)} {shown(event.name)}"


def _outcome(event: Event) -> str:
    return f"{OUTCOMES.get(event.name, shown(event.name))}: {shown(event.detail)}"


def _outlived(status: StatusFile, last: Event) -> bool:
    """Whether the newest start ended without a last word in status.json, which then tells of less."""
    if last.name == "start" or last.unix_s < (status.started_unix_s or 0):
        return False
    return f"{status.job}.{status.restart or 0}" != last.start or status.state in UNDER_WAY


def _progress(status: StatusFile) -> list[str]:
    step, total = status.step or 0, status.total_steps or 0
    share = f" ({step / total:.1%})" if total else ""
    lines = [f"step        {step:,} of {total:,}{share}, {status.tokens or 0:,} tokens"]
    checkpoint = status.checkpoint_step
    lines.append(f"checkpoint  {f'step {checkpoint:,}' if checkpoint is not None else 'none yet'}")
    if status.loss is not None:
        lines.append(f"loss        {status.loss:.4f}")
    if status.tokens_per_s is not None:
        lines.append(f"speed       {status.tokens_per_s:,.0f} tokens/s")
    if status.eta_s is not None and status.state == "running":
        lines.append(f"time left   {_duration(status.eta_s)}")
    return lines


def _skipped(run: Path) -> list[str]:
    """Of metrics.jsonl: how many steps changed nothing, because their gradient was not finite."""
    count, newest = 0, None
    try:
        with (run / "metrics.jsonl").open("rb") as stream:
            for line in stream:
                try:
                    fields = orjson.loads(line) if b'"skipped"' in line else None
                except orjson.JSONDecodeError:  # cut, as the last one may be
                    continue
                if isinstance(fields, dict) and fields.get("skipped") == 1:
                    count, newest = count + 1, fields.get("step")
    except OSError:
        return []
    last = f", the last of them step {newest:,}" if isinstance(newest, int) else ""
    return [f"skipped     {count:,} steps, whose gradient norm was not finite{last}"] if count else []


def _restarts(events: list[Event]) -> list[str]:
    """A line for each start after the first, with what ended the one before."""
    lines: list[str] = []
    before: Event | None = None
    for event in events:
        if event.name == "start" and before is not None:
            step = f"from step {event.step:,}" if event.step >= 0 else "from the beginning"
            # A start that wrote no end was ended from outside: its node was lost, or it was killed.
            why = "lost without a word: a node, or killed" if before.name == "start" else shown(before.detail)
            when = datetime.fromtimestamp(event.unix_s).strftime("%Y-%m-%d %H:%M:%S")
            lines.append(f"            {when}  {shown(event.start)} {step}: {why}")
        before = event
    return [f"restarts    {len(lines)}", *lines] if before else []


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.status")
    parser.add_argument("run", type=Path)
    parser.add_argument("--failed", metavar="REASON")
    arguments = parser.parse_args(argv)
    try:
        if arguments.failed:
            mark_failed(arguments.run, arguments.failed)
        print(report(arguments.run))
    except RemitError as error:
        print(f"remit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
