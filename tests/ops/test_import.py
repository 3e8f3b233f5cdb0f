"""Importing the package is free of side effects."""

import subprocess
import sys

CODE = """
import os, sys
before = dict(os.environ)
import remit_megatron
from remit_megatron import remit_weights, token_nll
assert os.environ == before
loaded = {name.split(".")[0] for name in sys.modules}
assert "megatron" not in loaded
assert "remit_megatron.ops.token_nll_triton" not in sys.modules
assert sorted(remit_megatron.__all__) == ["__version__", "remit_weights", "token_nll"]
"""


def test_import_loads_neither_megatron_nor_the_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
