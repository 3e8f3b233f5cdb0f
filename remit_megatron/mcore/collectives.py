"""A sum over tensor-parallel ranks inside autograd, and what it means when ranks cannot talk to each other."""

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.errors import HangError, LostRankError, RemitError

TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
GONE = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection refused|remote process exited", re.IGNORECASE)
GLOO = re.compile(r"gloo/|Application timeout caused pair closure|Timed out waiting \d+ms|Connection closed by peer")


def failure_of_ranks(error: BaseException) -> RemitError | None:
    """What a failed collective or rendezvous tells: a HangError after a timeout, a LostRankError where a rank is gone.

    None for every other error. gloo raises plain RuntimeErrors, so that its words have to tell.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and GLOO.search(text)):
        return None
    text = re.sub(r"^\[[^]]*\] ", "", text)[:300]
    if TIMED_OUT.search(text):
        return HangError(f"ranks do not answer: {text} (compute.collective_timeout_s)")
    if GONE.search(text):
        return LostRankError(f"another rank is gone, its own log says why: {text}")
    return None


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself; its gradient is summed over the ranks. For a tensor that all ranks hold and use differently.

    Megatron's mapping of that meaning reduces `grad.contiguous()` in place and returns `grad`: where the gradient is a
    slice of a larger one, it comes back as it was, without an error.
    """
    return _SumGradients.apply(x, group) if group.size() > 1 else x


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
