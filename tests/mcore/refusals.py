"""What is said to each of several mistakes."""

from collections.abc import Callable, Mapping
from typing import Any

from remit_megatron.errors import UserError


def messages_of(cases: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """The message of each case's UserError, by the case's name; "accepted" where there is none."""
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = "accepted"
        except UserError as error:
            found[name] = str(error)
    return found
