"""What TRL's engine has around it: the packages that it needs, and the wish that it stops."""

import signal
from types import FrameType

from remit_megatron.processes import STOP_SIGNALS

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets")


class Stop:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
