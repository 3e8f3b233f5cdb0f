"""Token NLL over a vocabulary sharded by tensor parallelism: one read of the logits forward, one pass backward."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.implementation import Implementation, triton_kernels
from remit_megatron.ops.shard import Shard, check_labels, combine_stats, gradient_coefficient

MIN_PIECE_ELEMENTS = 2**18
MAX_PIECE_ELEMENTS = 2**24
"""Bounds of the float32 working copy, in elements: 1 MiB, below which the calls cost more than the arithmetic, and
64 MiB. Between them it is 1/512 of the logits, so 0.8% of their bytes for 16-bit logits."""


class Kernels(NamedTuple):
    """One implementation of the two passes over the logits."""

    local_stats: Callable[[Tensor, Tensor, Shard], Tensor]
    """(logits [..., L], labels [...], shard) -> [2, ...] float32, see `combine_stats`. Reads the logits only."""
    write_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Shard, Tensor], None]
    """(logits [..., L], labels [...], lse [...], coefficient [...], shard, out [..., L]): writes
    coefficient * (exp(logits - lse) - onehot) into `out`, rounded once; `out` may be `logits`."""


def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Negative log-likelihood of each label, in nats.

    Weights are no argument: multiply the result by them, and the upstream gradient carries them into the backward
    pass at the cost of one number a token.

    Args:
        logits: [..., L] this rank's columns, bfloat16, float16 or float32, any strides. Rank r of `tp_group` holds
            the columns [r L, (r + 1) L).
        labels: [...] int64 column numbers of the whole vocabulary, or -100 for a token to ignore.
        valid_vocab: columns from this number on are padding: not in the softmax, gradient exactly 0. None: all count.
        tp_group: ranks that hold the other columns. None: the logits are whole.
        implementation: "torch", "triton", or "auto": Triton on CUDA, torch on CPU.

    Returns:
        [...] float32, differentiable, the same bits on all ranks of `tp_group`. An ignored label gives 0 and a zero
        gradient row. A label outside [0, valid_vocab) gives NaN, because checking it would wait for the device.

    Collectives: one all-gather of [2, n] float32 where tp_group has several ranks, none in backward.

    The forward pass modifies nothing. The backward pass overwrites logits that are an intermediate result with their
    gradient, so they must not be read afterwards; a second backward pass, or another operation that saved them,
    raises through autograd's version counter (pass a clone then). A leaf, or a view of one, is left as it is.

    Raises:
        UserError: the implementation cannot run here.
    """
    check_labels(logits, labels)
    shard = Shard.of(logits.shape[-1], valid_vocab, tp_group)
    kernels = select_kernels(implementation, logits.device.type)
    nll: Tensor = _TokenNLL.apply(logits, labels, shard, kernels, is_overwritable(logits))
    return nll


def local_stats(logits: Tensor, labels: Tensor, shard: Shard, *, implementation: Implementation = "auto") -> Tensor:
    """Statistics of this rank's columns for `combine_stats`. logits [..., L], labels [...] -> [2, ...] float32."""
    check_labels(logits, labels)
    return select_kernels(implementation, logits.device.type).local_stats(logits, labels, shard)


def select_kernels(implementation: Implementation, device_type: str) -> Kernels:
    """The implementation by name. Raises UserError where it cannot run: nothing else is taken in its place."""
    kernels = triton_kernels(implementation, device_type, "token_nll_triton")
    if kernels is None:
        return Kernels(torch_local_stats, torch_write_gradient)
    return Kernels(kernels.local_stats, kernels.write_gradient)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, shard: Shard, kernels: Kernels, may_overwrite: bool
    ) -> Tensor:
        lse, nll = combine_stats(kernels.local_stats(logits, labels, shard), labels, shard)
        ctx.save_for_backward(logits, labels, lse)
        ctx.shard, ctx.kernels, ctx.may_overwrite = shard, kernels, may_overwrite
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, lse = ctx.saved_tensors
        logits = logits.detach()  # shares the version counter, so the guard against a second use holds
        out = logits if ctx.may_overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        coefficient = gradient_coefficient(upstream, labels, ctx.shard)
        ctx.kernels.write_gradient(logits, labels, lse, coefficient, ctx.shard, out)
        return out, None, None, None, None


def is_overwritable(logits: Tensor) -> bool:
    """Whether the gradient may take the logits' place: they are nobody's parameter, and no two of them share memory."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        return False
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * size)
    return True


def pieces(shape: torch.Size) -> Iterator[tuple[slice, ...]]:
    """Cuts logits [..., L] along leading dimensions into pieces whose float32 copy is small beside them."""
    limit = min(max(math.prod(shape) // 512, MIN_PIECE_ELEMENTS), MAX_PIECE_ELEMENTS)

    def cut(ranges: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
        sizes = [one.stop - one.start for one in ranges]
        if math.prod(sizes) * shape[-1] <= limit or max(sizes, default=1) <= 1:
            yield ranges
            return
        longest = sizes.index(max(sizes))
        start, stop = ranges[longest].start, ranges[longest].stop
        for half in (slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)):
            yield from cut((*ranges[:longest], half, *ranges[longest + 1 :]))

    if math.prod(shape) > 0:
        yield from cut(tuple(slice(0, size) for size in shape[:-1]))


def torch_local_stats(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """`Kernels.local_stats` in torch. A row's result does not depend on the rows beside it."""
    stats = torch.empty(2, *labels.shape, dtype=torch.float32, device=logits.device)
    if shard.num_valid == 0:
        stats[0] = -torch.inf
        stats[1] = 0.0
        return stats
    for piece in pieces(logits.shape):
        _piece_stats(logits.detach()[piece], labels[piece], shard, stats[(slice(None), *piece)])
    return stats


def _piece_stats(logits: Tensor, labels: Tensor, shard: Shard, out: Tensor) -> None:
    """A function of its own, so that one piece's working copy is freed before the next one's is made."""
    x = logits[..., : shard.num_valid]
    column, owned = _owned_columns(labels, shard)
    # Finite, so that a row of -inf gives -inf and not nan.
    largest = x.amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).min)
    exp = x.to(torch.float32, copy=True).sub_(largest).exp_()
    out[0] = largest.squeeze(-1) + _sum_rows(exp).log_()
    out[1] = torch.where(owned, x.gather(-1, column[..., None]).squeeze(-1).float(), 0.0)


def torch_write_gradient(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficient: Tensor, shard: Shard, out: Tensor
) -> None:
    """`Kernels.write_gradient` in torch."""
    for piece in pieces(logits.shape):
        out[piece][..., shard.num_valid :] = 0
        if shard.num_valid:
            x, y = (whole[piece][..., : shard.num_valid] for whole in (logits, out))
            _piece_gradient(x, labels[piece], lse[piece][..., None], coefficient[piece][..., None], shard, y)


def _piece_gradient(x: Tensor, labels: Tensor, lse: Tensor, coefficient: Tensor, shard: Shard, out: Tensor) -> None:
    column, owned = _owned_columns(labels, shard)
    work = x.to(torch.float32, copy=True).sub_(lse).exp_()
    work.scatter_add_(-1, column[..., None], -owned.float()[..., None])
    # Filled, not multiplied by 0: the logits of a masked token may be anything.
    out.copy_(work.mul_(coefficient).masked_fill_(coefficient == 0, 0.0))


def _owned_columns(labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(column of the label in this shard, or 0; whether this shard has it), both of the labels' shape."""
    owned = (labels >= shard.first) & (labels < shard.first + shard.num_valid)
    return torch.where(owned, labels - shard.first, 0), owned


def _sum_rows(x: Tensor) -> Tensor:
    """Sum over the last dimension. torch cuts a single row over threads, which changes the order and the bits."""
    if x.numel() == x.shape[-1]:
        return x.reshape(1, -1).expand(2, -1).sum(dim=-1)[0].view(x.shape[:-1])
    return x.sum(dim=-1)
