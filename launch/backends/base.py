"""What every back end is: a place where runs train, asked in the same five ways."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from launch.profiles import Profile, Section
from launch.run_folder import lock_is_held
from remit_megatron.config import Recipe
from remit_megatron.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One run that is to be started."""

    recipe: Recipe
    run: Path
    """Absolute."""
    workdir: Path
    """What relative paths of the recipe start from."""
    nodes: int = 1
    nproc: int | None = None
    """Ranks a node."""
    chain: int = 1
    arguments: tuple[str, ...] = ()
    """More arguments of `remit train`."""

    @property
    def train(self) -> list[str]:
        """Arguments of `remit`, by which a rank trains what the run folder holds."""
        # Bare, for an absolute path is no TOML value, and then it is taken as it is.
        return ["train", str(self.run / "recipe.toml"), "--set", f"run={self.run}", *self.arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What has become of a launch."""

    jobs: tuple[str, ...] = ()
    """Ids by which the place knows what goes on there without this process."""
    exit_code: int | None = None
    """Of a run that has come to its end; None: it has not."""


class Life(Enum):
    """Whether a run's processes are there, as far as its place knows."""

    WAITS = "waits"
    """Accepted, and not started or between two starts."""
    LIVES = "lives"
    GONE = "gone"


S = TypeVar("S", bound=Section)


class Backend(ABC, Generic[S]):
    """A place where runs train. One is made for a launch, of the profile that the command line names."""

    name: ClassVar[str]
    """What --on says, and the name of its section in a profile."""
    default_profile: ClassVar[str | None] = None
    """A shipped profile, where --on names none; None: then every setting is at its default."""
    takes_profile: ClassVar[bool] = True
    flags: ClassVar[frozenset[str]] = frozenset()
    """Of --nodes, --chain and --follow: those that say something here."""
    settings_model: ClassVar[type[Section]] = Section
    """Of its section in a profile."""

    def __init__(self, profile: Profile, settings: S):
        self.profile = profile
        self.settings = settings

    @abstractmethod
    def check(self, launch: Launch) -> None:
        """Raise UserError for what could not start here. Writes nothing, and asks nobody who might not answer."""

    @abstractmethod
    def dry_run(self, launch: Launch) -> int:
        """Print what `submit` would start; writes nothing. Returns the exit code of the command."""

    @abstractmethod
    def submit(self, launch: Launch) -> Started:
        """Start it, in a run folder that is there. A place without a queue runs it to its end."""

    def follow(self, launch: Launch, started: Started) -> int | None:
        """Show what a run does until it ends; its exit code, None where the user has stopped watching."""
        return started.exit_code

    @staticmethod
    def status(run: Path, jobs: Sequence[str], host: str | None) -> Life | None:
        """Whether the run's processes are there; None where nobody here can tell.

        jobs: ids of those that its folder names; host: where its rank 0 last said to be. Here: the lock of the run
        folder tells, for sure only on that host, for others may not see its locks.
        """
        held = lock_is_held(run)
        if held is None:
            return None
        return Life.LIVES if held else Life.GONE if host == os.uname().nodename else None


def passed_values(profile: Profile) -> dict[str, str]:
    """The variables that a profile takes from this environment. Raises UserError for one that is not set."""
    for name in profile.environment.passed:
        if name not in os.environ:
            raise UserError(
                f"environment.pass of the profile names {name}, which is not set: set it, or remove it there"
            )
    return {name: os.environ[name] for name in profile.environment.passed}
