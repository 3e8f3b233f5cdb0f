"""The two passes of `token_nll` over the logits as Triton kernels: one read forward, one read and write backward.

Both are bound by memory: bf16 logits cost 2 bytes each forward and 4 backward. Every row is computed by one program in
a fixed order, so results are the same bits from run to run. Nothing waits for the device, so both can be captured in
a CUDA graph.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from remit_megatron.ops.implementation import device_of
from remit_megatron.ops.shard import Shard

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)

STATS_LANES = 512
STATS_WARPS = 8
GRADIENT_BLOCK = 4096
GRADIENT_WARPS = 8


@triton.jit
def token_stats_kernel(  # type: ignore[no-untyped-def]
    X,  # [n_outer, n_inner, L] logits of this rank; strides below, in elements
    stride_outer,
    stride_inner,
    stride_column,
    n_inner,
    Y,  # [n] int64 labels, column numbers of the whole vocabulary, contiguous
    OUT,  # [2, n] fp32, written: log-sum-exp of the valid columns; target logit, 0 where the label is elsewhere
    out_stride,
    first,  # number of this rank's first column
    num_valid,  # columns of this rank in the softmax
    LANES: tl.constexpr,
    K: tl.constexpr,
):
    """One row a program. A lane owns K contiguous columns (128 bits) of every tile and its own running (max, sum).

    The lanes meet once, after the loop, so the loop has neither barrier nor shuffle, and 1 + 1/K exp2 a column.
    """
    r = tl.program_id(0)
    # n * L passes 2^31 at about 21k tokens, so offsets are 64 bits; the division is cheaper in 32.
    X += (r // n_inner).to(tl.int64) * stride_outer + (r % n_inner).to(tl.int64) * stride_inner
    columns = tl.arange(0, LANES)[:, None] * K + tl.arange(0, K)[None, :]
    m = tl.full([LANES], LOWEST, tl.float32)  # finite: a lane that saw nothing, or -inf, must not give inf - inf
    d = tl.zeros([LANES], tl.float32)
    full = num_valid // (LANES * K) * (LANES * K)
    # Whole tiles need no mask: a mask that is not a multiple of the vector would split the loads.
    for i in range(0, full, LANES * K):
        x = tl.load(X + (i + columns).to(tl.int64) * stride_column).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 1))
        # The difference first: it is exact near the maximum, where a product with log2(e) would round.
        d = d * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, None]) * LOG2E), 1)
        m = m_new
    if full < num_valid:
        o = full + columns
        x = tl.load(X + o.to(tl.int64) * stride_column, mask=o < num_valid, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 1))
        d = d * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, None]) * LOG2E), 1)
        m = m_new
    m_row = tl.max(m, 0)
    d_row = tl.sum(d * tl.exp2((m - m_row) * LOG2E), 0)
    y = tl.load(Y + r) - first
    target = tl.load(X + y * stride_column, mask=(y >= 0) & (y < num_valid), other=0.0).to(tl.float32)
    tl.store(OUT + r, m_row + tl.log2(d_row) * LN2)
    tl.store(OUT + out_stride + r, target)


@triton.jit
def token_gradient_kernel(  # type: ignore[no-untyped-def]
    X,  # [n_outer, n_inner, L] logits of this rank; strides below, in elements
    stride_outer,
    stride_inner,
    stride_column,
    n_inner,
    OUT,  # the same shape and dtype, written; it may be X itself
    out_stride_outer,
    out_stride_inner,
    out_stride_column,
    Y,  # [n] int64 labels, contiguous
    LSE,  # [n] fp32 log-sum-exp over the whole vocabulary
    COEFFICIENT,  # [n] fp32 upstream gradient, 0 for a token to ignore
    first,
    num_valid,
    num_local,  # L
    BLOCK: tl.constexpr,
):
    """OUT <- COEFFICIENT[r] * (exp(X - LSE[r]) - onehot), rounded once. Grid (rows, blocks of columns).

    Padding columns and rows of coefficient 0 get zeros; such a row's logits are not read, so they may be anything.
    """
    r = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    o = start + tl.arange(0, BLOCK)
    # Only a product with a stride can pass 2^31: 64-bit columns would double the comparison's instructions.
    outer, inner, wide = (r // n_inner).to(tl.int64), (r % n_inner).to(tl.int64), o.to(tl.int64)
    X += outer * stride_outer + inner * stride_inner + wide * stride_column
    OUT += outer * out_stride_outer + inner * out_stride_inner + wide * out_stride_column
    c = tl.load(COEFFICIENT + r)
    # A branch on the scalar, not part of the mask: the interpreter cannot combine a block with a float comparison.
    if c == 0.0:
        zeros = tl.zeros([BLOCK], tl.float32).to(OUT.dtype.element_ty)
        if start + BLOCK <= num_local:
            tl.store(OUT, zeros)
        else:
            tl.store(OUT, zeros, mask=o < num_local)
    else:
        lse = tl.load(LSE + r)
        label = tl.load(Y + r) - first
        y = tl.where((label >= 0) & (label < num_valid), label, -1).to(tl.int32)
        if start + BLOCK <= num_valid:  # no mask, so that loads and stores stay 128 bits wide for any num_valid
            x = tl.load(X).to(tl.float32)
            g = tl.exp2((x - lse) * LOG2E)
            g = tl.where(o == y, g - 1.0, g) * c
            tl.store(OUT, g.to(OUT.dtype.element_ty))
        else:
            valid = o < num_valid
            x = tl.load(X, mask=valid, other=-float("inf")).to(tl.float32)
            g = tl.exp2((x - lse) * LOG2E)
            g = tl.where(o == y, g - 1.0, g) * c
            tl.store(OUT, tl.where(valid, g, 0.0).to(OUT.dtype.element_ty), mask=o < num_local)


INTERPRETED = not isinstance(token_stats_kernel, triton.JITFunction)
"""Whether Triton's interpreter, which runs on CPU tensors, was chosen before this module was imported."""


class Rows(NamedTuple):
    """Logits whose leading dimensions are at most two strided ones, the unit of a launch."""

    logits: Tensor
    out: Tensor
    first_row: int
    num_rows: int
    n_inner: int
    strides: tuple[int, int, int]
    """Outer, inner, column; in elements."""


def local_stats(logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """`Kernels.local_stats` of ops/token_nll.py."""
    logits, labels = logits.detach(), labels.contiguous()
    stats = torch.empty(2, *labels.shape, dtype=torch.float32, device=logits.device)
    flat_labels, flat_stats = labels.view(-1), stats.view(2, -1)
    columns_per_lane = 16 // logits.element_size()
    with device_of(logits):
        for rows in _launches(logits, logits, 0):
            own = slice(rows.first_row, rows.first_row + rows.num_rows)
            token_stats_kernel[(rows.num_rows,)](
                rows.logits,
                *rows.strides,
                rows.n_inner,
                flat_labels[own],
                flat_stats[:, own],
                flat_stats.stride(0),
                shard.first,
                shard.num_valid,
                LANES=STATS_LANES,
                K=columns_per_lane,
                num_warps=STATS_WARPS,
                enable_fp_fusion=True,
            )
    return stats


def write_gradient(logits: Tensor, labels: Tensor, lse: Tensor, coefficient: Tensor, shard: Shard, out: Tensor) -> None:
    """`Kernels.write_gradient` of ops/token_nll.py."""
    flat_labels, flat_lse, flat_coefficient = (x.contiguous().view(-1) for x in (labels, lse, coefficient))
    num_local = logits.shape[-1]
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(max(num_local, 1)))
    with device_of(logits):
        for rows in _launches(logits, out, 0):
            own = slice(rows.first_row, rows.first_row + rows.num_rows)
            out_strides = _strides(rows.out, rows.n_inner)
            token_gradient_kernel[(rows.num_rows, triton.cdiv(num_local, block))](
                rows.logits,
                *rows.strides,
                rows.n_inner,
                rows.out,
                *out_strides,
                flat_labels[own],
                flat_lse[own],
                flat_coefficient[own],
                shard.first,
                shard.num_valid,
                num_local,
                BLOCK=block,
                num_warps=GRADIENT_WARPS,
                enable_fp_fusion=True,
            )
    # Autograd cannot see a kernel's write; its guard against a second use of the logits needs to.
    torch.autograd.graph.increment_version(out)


def _collapsed(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions of x [..., L], neighbours merged where one stride reaches over both."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _strides(x: Tensor, n_inner: int) -> tuple[int, int, int]:
    """Outer, inner and column stride of x [..., L] whose rows are walked as [n_outer, n_inner]."""
    merged = _collapsed(x)
    column = x.stride(-1)
    if len(merged) == 2:
        assert merged[1][0] == n_inner, "logits and gradient must be walked alike"
        return merged[0][1], merged[1][1], column
    stride = merged[0][1] if merged else 0
    return n_inner * stride, stride, column


def _launches(logits: Tensor, out: Tensor, first_row: int) -> Iterator[Rows]:
    """Cuts the leading dimensions until two strides describe the rows; usually one launch."""
    num_rows = logits.shape[:-1].numel()
    if num_rows == 0 or logits.shape[-1] == 0:
        return
    merged, merged_out = _collapsed(logits), _collapsed(out)
    inner = {dims[1][0] for dims in (merged, merged_out) if len(dims) == 2}
    if max(len(merged), len(merged_out)) > 2 or len(inner) > 1:
        for i in range(logits.shape[0]):
            yield from _launches(logits[i], out[i], first_row + i * (num_rows // logits.shape[0]))
        return
    n_inner = inner.pop() if inner else num_rows
    yield Rows(logits, out, first_row, num_rows, n_inner, _strides(logits, n_inner))
