"""Start N local ranks of a command, pass signals on, and end as the ranks end."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from remit_megatron.errors import HangError
from remit_megatron.processes import STOP_SIGNALS, die_with_parent, hold_stop_signals

GRACE_S = 10.0
"""How long the other ranks may live after one has failed: enough for their own error messages."""
STOPPED_ON_REQUEST = 75


def run_local(command: list[str], nproc: int, *, listens: bool = False) -> int:
    """Run `command` as ranks 0..nproc-1 on this machine; returns the exit code.

    listens: it comes to StopSignals, and signals that arrive before are kept for it. Another command dies of them.

    All ranks 0: 0. Otherwise the first failing rank's code decides, and 86 over all others, for those that waited for a
    hanging rank fail as well. The others are ended after a grace period, stopped ones too. SIGTERM, SIGINT and SIGUSR1
    go to every rank; a second SIGTERM or SIGINT also starts the grace period, for ranks that hang. A rank dies with
    this process, also when that is killed.
    """
    import torch.distributed as dist  # takes seconds, which a dry run need not wait for

    # Held by this process, so that no port is chosen by one process and opened by another.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen[Any]] = []

    requests: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {n: signal.signal(n, forward) for n in STOP_SIGNALS}
    try:
        for rank in range(nproc):
            environment = {
                # Otherwise gloo listens where this machine's name resolves to, if it does.
                **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}),
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                # torch's own name for "a store is already being served at MASTER_PORT".
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            become_rank = functools.partial(_become_rank, os.getpid(), listens)
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=become_rank))
            for number in requests:  # that came while there was no such rank yet
                ranks[-1].send_signal(number)
        return _wait(ranks, requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank_process in ranks:
            if rank_process.poll() is None:
                rank_process.kill()
                rank_process.wait()


def run_client(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a program that stands for ranks elsewhere, such as a container's client; returns its exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to it and nothing else is done about them: it ends when its ranks have.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # In a session of its own, or a terminal would send Ctrl-C to it a second time.
    client = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, held),
    )
    before = {n: signal.signal(n, lambda number, frame: client.send_signal(number)) for n in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    try:
        code = client.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _become_rank(launcher: int, listens: bool) -> None:
    """In a child, right before its program starts."""
    die_with_parent(launcher)
    if listens:
        hold_stop_signals()


def _wait(ranks: list[subprocess.Popen[Any]], requests: list[int]) -> int:
    deadline: float | None = None
    failed: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code not in (None, 0, STOPPED_ON_REQUEST) and failed is None:
                failed = code
                deadline = deadline or time.monotonic() + GRACE_S
                _say(
                    f"rank {number} ended {_how(code)}"
                    + (f", the others have {GRACE_S:.0f} s" if None in codes else "")
                )
        if deadline is None and sum(n in (signal.SIGINT, signal.SIGTERM) for n in requests) > 1:
            deadline = time.monotonic() + GRACE_S
            _say(f"asked to stop again: ranks that have not ended in {GRACE_S:.0f} s are killed")
        if None not in codes or (deadline is not None and time.monotonic() > deadline):
            break
        time.sleep(0.05)
    if HangError.exit_code in codes:
        return HangError.exit_code
    if failed is None and None in codes:
        failed = -signal.SIGKILL
    if failed is None:
        return STOPPED_ON_REQUEST if STOPPED_ON_REQUEST in codes else 0
    # A negative code is a signal's number; the shell's convention is 128 + n.
    return failed if failed > 0 else 128 - failed


def _how(code: int) -> str:
    return f"with exit code {code}" if code > 0 else f"by signal {-code} ({signal.Signals(-code).name})"


def _say(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
