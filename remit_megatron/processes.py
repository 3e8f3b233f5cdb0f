"""What the operating system is asked about this process, and the signals that ask it to stop."""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""They ask a run to save and stop."""


READER_GONE = 128 + signal.SIGPIPE
"""Exit code of a command whose output nobody reads any more, as of any other program in `... | head`."""


def while_read(command: Callable[[], int]) -> int:
    """Run a command. Where the reader of its output has gone, as `head` does, it ends in silence with READER_GONE."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends, where the error could only be printed
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream.fileno())]
        if not gone:
            raise  # another pipe's, or a socket's
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return READER_GONE


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


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
