"""Errors with an exit code. Anything else that escapes is a bug and keeps its traceback."""


class RemitError(Exception):
    """Base of every error that ends a command with one line on stderr instead of a traceback."""

    exit_code = 1
    first_to_say: bool | None = None
    """Of several ranks that stop with one error, whether this one reports it. None: decided by rank."""

    def __str__(self) -> str:
        """One line: what a message quotes, of a file or a library, may hold line ends and control characters."""
        text = super().__str__().rstrip()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(RemitError):
    """A mistake in a recipe, an argument or an input file. The message names it and the remedy."""

    exit_code = 2


class DamagedError(UserError):
    """Files of a checkpoint are not what they were when they were written. The message names them."""


class RunError(RemitError):
    """A failure at run time that no change of the recipe prevents: a bad disk, a diverged run, a lost rank."""

    exit_code = 1


class LostRankError(RunError):
    """Another rank is gone; its own log says why."""


class StopRequested(RemitError):
    """The run was asked to stop, finished its step and saved a checkpoint."""

    exit_code = 75


class HangError(RemitError):
    """No progress for too long, or a collective that timed out: a rank or the network is stuck."""

    exit_code = 86


class PreflightError(RemitError):
    """A node is not fit to train on. The message names it."""

    exit_code = 87
