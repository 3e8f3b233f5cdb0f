"""Start N local ranks of a command, pass signals on, and end as the ranks end."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

GRACE_S = 10.0
"""How long the other ranks may live after one has failed: enough for their own error messages."""
PR_SET_PDEATHSIG = 1


def run_local(command: list[str], nproc: int) -> int:
    """Run `command` as ranks 0..nproc-1 on this machine; returns the exit code.

    All ranks 0: 0. Otherwise the first failing rank's code decides; the others are ended after a grace period. SIGTERM,
    SIGINT and SIGUSR1 go to every rank. A rank dies with this process, also when that is killed.
    """
    # Held by this process, so that no port is chosen by one process and opened by another.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen[Any]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
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
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with(os.getpid())))
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank_process in ranks:
            if rank_process.poll() is None:
                rank_process.kill()
                rank_process.wait()


def _wait(ranks: list[subprocess.Popen[Any]]) -> int:
    deadline: float | None = None
    first: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + GRACE_S
        if all(code is not None for code in codes) or (deadline is not None and time.monotonic() > deadline):
            # A negative code is a signal's number; the shell's convention is 128 + n.
            return 0 if first is None else first if first > 0 else 128 - first
        time.sleep(0.05)


def _die_with(parent: int) -> Any:
    """For the child, before exec: ask the kernel for SIGKILL when its parent dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)

    return ask
