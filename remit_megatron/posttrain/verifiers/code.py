"""Python programs, tried by their tests. What runs is written by a model: use a container."""

import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

from remit_megatron.posttrain.verifiers.base import Verifier

TIMEOUT_S = 10
MEMORY_BYTES = 2 << 30
BLOCK = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


class Python(Verifier):
    """The last block of code, else the whole answer, followed by each test (`assert ...`): all have to pass.

    A process of its own with limits of time and memory: enough against mistakes, and no wall against intent.
    """

    name = "python"
    runs_code = True

    def problem(self, truth: Any) -> str | None:
        tests = isinstance(truth, list) and truth and all(isinstance(test, str) and "assert" in test for test in truth)
        return None if tests else "a list of tests (`assert ...`) is expected"

    def right_answer(self, truth: Any) -> str | None:
        return None

    def score(self, text: str, truth: Any) -> float:
        program = (BLOCK.findall(text) or [text])[-1]
        # The word is printed last: a program that ends early with exit code 0 has passed nothing.
        word = "all-tests-passed"
        source = "\n".join([program, *truth, f"print({word!r})"])
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-c", source],
                    cwd=folder,
                    env={},
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=TIMEOUT_S,
                    preexec_fn=_limit,
                )
            except (subprocess.TimeoutExpired, OSError, ValueError):  # ValueError: a NUL in the source
                return 0.0
        return float(done.returncode == 0 and done.stdout.splitlines()[-1:] == [word])


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT_S, TIMEOUT_S))


PYTHON = Python()
