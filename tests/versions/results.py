"""A pytest plugin: with RECORD=1 a run keeps in tests/versions/results/ what it ran under its versions.

`make matrix` makes the README's table of these files.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if os.environ.get("RECORD") != "1" or hasattr(config, "workerinput"):
        return
    parts: dict[str, dict[str, int]] = {}
    for outcome in OUTCOMES:
        for report in terminalreporter.getreports(outcome):
            counts = parts.setdefault(part_of(report.nodeid), dict.fromkeys(OUTCOMES, 0))
            counts[outcome] += 1
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("megatron-core", "torch")}
    path = FOLDER / f"python-{versions['python']}-megatron-core-{versions['megatron-core']}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if {name: known.get(name) for name in versions} == versions:  # parts that ran before stay
        parts = known["parts"] | parts
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps({**versions, "parts": dict(sorted(parts.items()))}, indent=2) + "\n")


def part_of(nodeid: str) -> str:
    """`mcore` of tests/mcore/test_parity.py::test_two_ranks, `install` of tests/test_install.py::..."""
    first = nodeid.partition("::")[0].removeprefix("tests/").partition("/")[0]
    return first.removeprefix("test_").removesuffix(".py")
