"""How a command of `remit` is started: the one place that knows what program stands behind that word."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

PROGRAM = "remit_megatron.cli"
"""By its name alone: nothing here imports it, for it starts what is in this package."""


def remit(arguments: Sequence[str]) -> list[str]:
    """The command line of `remit ARGUMENTS` with this interpreter."""
    return [sys.executable, "-m", PROGRAM, *arguments]


def become_remit(arguments: Sequence[str]) -> NoReturn:
    """This process goes on as `remit ARGUMENTS`: with its id, its environment and the signals that it holds back."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, remit(arguments))
