"""Where runs train: a back end is a module here and a line in BACKENDS."""

from typing import Any

from launch.backends.base import Backend
from launch.backends.docker import Docker
from launch.backends.local import Local
from launch.backends.slurm import Slurm
from launch.profiles import Profile, load_profile
from remit_megatron.errors import UserError

BACKENDS: dict[str, type[Backend[Any]]] = {
    Local.name: Local,
    Docker.name: Docker,
    Slurm.name: Slurm,
}


def open_backend(target: str) -> Backend[Any]:
    """What --on names, as `NAME` or `NAME:PROFILE`. Raises UserError for what is none."""
    name, _, profile_name = target.partition(":")
    kind = BACKENDS.get(name)
    if kind is None or (profile_name and not kind.takes_profile):
        known = [form for one in BACKENDS.values() for form in _forms(one)]
        raise UserError(f"--on {target}: say {', '.join(known[:-1])} or {known[-1]}")
    profile_name = profile_name or kind.default_profile or ""
    if not profile_name:
        return kind(Profile(), kind.settings_model())
    profile, sections = load_profile(profile_name, {one.name: one.settings_model for one in BACKENDS.values()})
    return kind(profile, sections[name])


def with_flag(flag: str) -> list[str]:
    """Names of the back ends to which a flag says something."""
    return [name for name, kind in BACKENDS.items() if flag in kind.flags]


def _forms(kind: type[Backend[Any]]) -> list[str]:
    return [kind.name, f"{kind.name}:PROFILE"] if kind.takes_profile else [kind.name]
