"""What a verifier is."""

from abc import ABC, abstractmethod
from typing import Any


class Verifier(ABC):
    """Scores a completion's text against a ground truth. Scoring never raises, whatever the text."""

    name: str
    runs_code = False

    def load(self) -> None:
        """Import what it needs. Raises UserError, with what to install, where that is missing."""
        return

    @abstractmethod
    def problem(self, truth: Any) -> str | None:
        """Why nothing can be verified against this ground truth; None: it is known."""

    @abstractmethod
    def right_answer(self, truth: Any) -> str | None:
        """A text that has to be right, to try the verifier by; None where none can be written from the truth."""

    @abstractmethod
    def score(self, text: str, truth: Any) -> float:
        """In [0, 1]."""
