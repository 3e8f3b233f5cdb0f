"""The Triton kernels in Triton's interpreter. Run by test_triton.py in a process of its own, where TRITON_INTERPRET
is set before triton is imported; the rest of the suite must not see it.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from remit_megatron.ops import token_nll_triton
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.shard import Shard, combine_stats, gradient_coefficient
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    Case,
    check_gradient,
    check_nll,
    check_no_worse_than_torch,
    gradient_of,
    make_case,
)
from tests.ops.groups import SIZES, WORLD, CollectiveCounter, make_groups
from tests.ranks import run_ranks

ROUNDING = {torch.float32: 0.501, torch.float16: 0.501, torch.bfloat16: 1.001}
"""The interpreter truncates to bfloat16 where a GPU rounds to nearest (test_triton.py reads that in the PTX)."""
TILE = token_nll_triton.STATS_LANES * 8

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def run(case: Case, logits: torch.Tensor, **options: Any) -> torch.Tensor:
    """Checks the NLL and that forward changed nothing, then runs backward."""
    before = logits.detach().clone()
    nll = token_nll(logits, case.labels, valid_vocab=case.valid_vocab, implementation="triton", **options)
    assert torch.equal(logits.detach(), before)
    check_nll(nll.detach(), case.spec()[0], case)
    nll.backward(case.upstream)
    return nll.detach()


def gradient_rounded_to_nearest(logits: torch.Tensor, case: Case, tp_group: Any = None) -> torch.Tensor:
    """The kernels' gradient, written in float32 and rounded by torch, as a GPU rounds."""
    shard = Shard.of(logits.shape[-1], case.valid_vocab, tp_group)
    lse, _ = combine_stats(token_nll_triton.local_stats(logits, case.labels, shard), case.labels, shard)
    coefficient, out = gradient_coefficient(case.upstream, case.labels, shard), torch.empty(logits.shape)
    token_nll_triton.write_gradient(logits, case.labels, lse, coefficient, shard, out)
    return out.to(logits.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leaf", [True, False])
def test_layouts(dtype: torch.dtype, layout: str, leaf: bool) -> None:
    case = make_case(0, s=5, b=3, vocab=50, valid_vocab=43, dtype=dtype)
    transform = LAYOUTS[layout]
    base = transform(case.logits).detach().requires_grad_() if leaf else case.logits.clone().requires_grad_()
    run(case, base if leaf else transform(base * 1))
    check_gradient(gradient_of(base), case.spec()[1], case, ROUNDING[dtype])


@pytest.mark.parametrize(
    ("vocab", "valid_vocab"),
    [(1, 1), (37, 37), (TILE, TILE), (TILE + 1, TILE + 1), (2 * TILE + 7, TILE), (2 * TILE + 7, TILE - 1), (64, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_around_a_tile(vocab: int, valid_vocab: int, dtype: torch.dtype) -> None:
    case = make_case(1, s=5, b=1, vocab=vocab, valid_vocab=valid_vocab, dtype=dtype)
    base = case.logits.clone().requires_grad_()
    run(case, base * 1)
    check_gradient(gradient_of(base), case.spec()[1], case, ROUNDING[dtype])


def test_columns_wider_than_a_gradient_block() -> None:
    case = make_case(2, s=2, b=1, vocab=2 * token_nll_triton.GRADIENT_BLOCK + 11, dtype=torch.bfloat16)
    case.labels.copy_(torch.tensor([[token_nll_triton.GRADIENT_BLOCK], [token_nll_triton.GRADIENT_BLOCK - 1]]))
    case.upstream.copy_(torch.tensor([[1.5], [-0.3]]))
    base = case.logits.clone().requires_grad_()
    run(case, base * 1)
    check_gradient(gradient_of(base), case.spec()[1], case, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("scale", [60.0, 3e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(scale: float, dtype: torch.dtype) -> None:
    case = make_case(3, s=6, b=2, vocab=70, scale=scale, dtype=dtype)
    base = case.logits.clone().requires_grad_()
    run(case, base * 1)
    check_gradient(gradient_of(base), case.spec()[1], case, ROUNDING[dtype])


@pytest.mark.parametrize("scale", [3.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(dtype: torch.dtype, scale: float) -> None:
    case = make_case(9, s=20, b=3, vocab=90, valid_vocab=83, scale=scale, dtype=dtype)
    nll = run(case, case.logits.clone().requires_grad_() * 1)
    check_no_worse_than_torch(nll, gradient_rounded_to_nearest(case.logits, case), case)


@pytest.mark.parametrize(
    "strides", [(2**30 + 64, 64, 1), (64, 2**30 + 64, 1), (3, 1, 2**27)], ids=["outer", "inner", "columns"]
)
def test_offsets_past_31_bits(strides: tuple[int, int, int]) -> None:
    """Rows and columns that lie further apart than 2^31 elements, in memory that is reserved and never touched."""
    case = make_case(10, s=3, b=3, vocab=20, valid_vocab=19, dtype=torch.bfloat16)
    extent = sum((size - 1) * stride for size, stride in zip((3, 3, 20), strides, strict=True)) + 1
    assert extent > 2**31
    logits = torch.empty(extent, dtype=torch.bfloat16).as_strided((3, 3, 20), strides)
    logits.copy_(case.logits)
    shard = Shard.of(20, case.valid_vocab, None)
    stats = token_nll_triton.local_stats(logits, case.labels, shard)
    lse, nll = combine_stats(stats, case.labels, shard)
    check_nll(nll, case.spec()[0], case)
    coefficient = gradient_coefficient(case.upstream, case.labels, shard)
    token_nll_triton.write_gradient(logits, case.labels, lse, coefficient, shard, logits)
    check_gradient(logits, case.spec()[1], case, ROUNDING[torch.bfloat16])


def test_four_dimensions_that_no_two_strides_describe() -> None:
    case = make_case(4, s=24, b=1, vocab=20)
    base = case.logits.clone().requires_grad_()
    logits = (base * 1).view(2, 3, 4, 20).permute(2, 1, 0, 3)
    labels, upstream = (x.view(2, 3, 4).permute(2, 1, 0) for x in (case.labels, case.upstream))
    nll = token_nll(logits, labels, implementation="triton")
    nll.backward(upstream)
    check_nll(nll.detach().permute(2, 1, 0).reshape(24, 1), case.spec()[0], case)
    check_gradient(gradient_of(base), case.spec()[1], case)


@pytest.mark.parametrize("shape", ["expanded", "transposed"])
def test_upstream_of_any_stride(shape: str) -> None:
    case = make_case(5, s=7, b=3, vocab=40)
    expanded = torch.tensor([0.5, -2.0, 0.0]).expand(7, 3)
    upstream = expanded if shape == "expanded" else case.upstream.t().contiguous().t()
    case.upstream.copy_(upstream.clone())
    base = case.logits.clone().requires_grad_()
    token_nll(base * 1, case.labels, implementation="triton").backward(upstream)
    check_gradient(gradient_of(base), case.spec()[1], case)


def test_a_row_does_not_depend_on_its_neighbours_or_its_stride() -> None:
    case = make_case(6, s=6, b=2, vocab=TILE + 9)
    whole = token_nll(case.logits, case.labels, implementation="triton")
    assert torch.equal(token_nll(case.logits[3, 1], case.labels[3, 1], implementation="triton"), whole[3, 1])
    turned = token_nll(case.logits.permute(1, 0, 2), case.labels.t(), implementation="triton")
    assert torch.equal(turned.t(), whole)


def test_masked_rows_may_hold_anything_and_no_tokens_is_fine() -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.nan
    logits[1] = torch.inf
    logits.requires_grad_()
    nll = token_nll(logits, torch.tensor([-100, 5, 6, 7]), implementation="triton")
    nll.backward(torch.tensor([3.0, 0.0, 1.0, 2.0]))
    assert nll[0] == 0
    assert not gradient_of(logits)[:2].any()
    assert gradient_of(logits)[2:].isfinite().all()
    assert token_nll(logits[:0], torch.zeros(0, dtype=torch.int64), implementation="triton").shape == (0,)


def test_second_use_of_overwritten_logits_raises() -> None:
    case = make_case(7, s=3, b=2, vocab=20)
    logits = case.logits.clone().requires_grad_() * 1
    nll = token_nll(logits, case.labels, implementation="triton")
    nll.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.sum().backward()


def test_chunked_head() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(21, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 47, (21,), generator=generator)
    whole = token_nll(hidden @ weight.t(), labels, valid_vocab=47, implementation="triton")
    assert torch.equal(linear_nll(hidden, weight, labels, valid_vocab=47, implementation="triton"), whole)
    chunks = linear_nll(hidden, weight, labels, valid_vocab=47, implementation="triton", chunk_tokens=4)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-5)


TP_CASES: dict[str, dict[str, Any]] = {
    "labels on the edges": {"s": 9, "b": 2, "vocab": 32, "valid_vocab": 27, "edge": 8},
    "shards without a valid column": {"s": 5, "b": 2, "vocab": 32, "valid_vocab": 13, "edge": 8},
    "bfloat16": {"s": 5, "b": 2, "vocab": 32, "valid_vocab": 30, "scale": 60.0, "dtype": torch.bfloat16},
    "float16": {"s": 5, "b": 2, "vocab": 32, "valid_vocab": 29, "dtype": torch.float16, "edge": 8},
}


def on_rank(rank: int) -> dict[tuple[int, str], Any]:
    found = {}
    for size, group in make_groups(rank).items():
        for name, shape in TP_CASES.items():
            case = make_case(8, **shape)
            leaf = case.logits.chunk(size, dim=-1)[dist.get_rank(group)].clone().requires_grad_()
            with CollectiveCounter() as counter:
                nll = run(case, leaf * 1, tp_group=group)
            gradient, leaf.grad = gradient_of(leaf), None
            again = run(case, leaf * 1, tp_group=group)
            assert torch.equal(again, nll), "the same bits from run to run"
            assert torch.equal(gradient_of(leaf), gradient)
            rounded = gradient_rounded_to_nearest(leaf.detach(), case, group)
            found[size, name] = (nll, gradient, rounded, counter.counts.total())
    return found


def test_tensor_parallel() -> None:
    results = run_ranks(WORLD, on_rank)
    for size in SIZES:
        for name, shape in TP_CASES.items():
            case = make_case(8, **shape)
            ranks = [one[size, name] for one in results]
            assert all(torch.equal(one[0], ranks[0][0]) for one in ranks)
            assert all(one[3] == (1 if size > 1 else 0) for one in ranks)
            gradient, rounded = (torch.cat([one[i] for one in ranks[:size]], dim=-1) for i in (1, 2))
            check_gradient(gradient, case.spec()[1], case, ROUNDING[case.logits.dtype])
            check_no_worse_than_torch(ranks[0][0], rounded, case)
