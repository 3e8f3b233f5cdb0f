"""What the operating system is asked about this process, and the signals that ask it to stop."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""They ask a run to save and stop."""


def hold_stop_signals() -> None:
    """In this process, and in a program that takes its place: they wait until StopSignals asks for them.

    By default they would end an interpreter that still imports. A late one, when nobody asks any more, changes nothing.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent dies (Linux); for a child, right after its fork.

    parent: its process id, by which a death before the request is noticed. None: whoever it is now.
    """
    if sys.platform.startswith("linux"):
        parent = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def serve_rank(rank_process: int) -> None:
    """For a helper process of a rank: it ends with the rank, and not by a signal that asks the whole job to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(rank_process)
