"""Importing the package changes nothing; activating the CPU platform does, once, and only there."""

import subprocess
import sys

CHECK = """
import sys, torch
before = torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type
import remit_megatron, remit_megatron.mcore, remit_megatron.mcore.platform, remit_megatron.cli
assert "megatron" not in sys.modules, "importing the package imports megatron"
assert (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type) == before
from remit_megatron.mcore import RemitGPTModel, make_forward_step
assert (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type) == before, "naming the plugin changes torch"
from remit_megatron.mcore import platform
assert platform.activate("cpu") == platform.activate("auto") == torch.device("cpu")
assert torch.cuda.current_device() == torch.device("cpu")
assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
try:
    remit_megatron.mcore.nothing
except AttributeError:
    print("done")
"""


def test_import_and_activation() -> None:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr
