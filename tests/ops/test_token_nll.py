"""`token_nll` in one process against the float64 specification: values, gradients, and what must not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remit_megatron.errors import UserError
from remit_megatron.ops import spec, token_nll
from remit_megatron.ops.implementation import describe_implementation
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.shard import Shard
from remit_megatron.ops.weights import remit_weights
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    check_gradient,
    check_nll,
    check_no_worse_than_torch,
    gradient_of,
    make_case,
)


@given(data=st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_matches_specification(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 90), "vocab")
    case = make_case(
        data.draw(st.integers(0, 2**31), "seed"),
        s=data.draw(st.integers(1, 9), "s"),
        b=data.draw(st.integers(1, 4), "b"),
        vocab=vocab,
        valid_vocab=data.draw(st.integers(1, vocab), "valid_vocab"),
        scale=data.draw(st.sampled_from([0.0, 1.0, 60.0, 3e3]), "scale"),  # 60 overflows exp, 3e3 reaches 1e4
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
    )
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")]
    leaf = data.draw(st.booleans(), "leaf")
    want_nll, want_gradient = case.spec()

    base = layout(case.logits).detach().requires_grad_() if leaf else case.logits.clone().requires_grad_()
    logits = base if leaf else layout(base * 1)
    before = logits.detach().clone()
    nll = token_nll.token_nll(logits, case.labels, valid_vocab=case.valid_vocab)
    assert torch.equal(logits.detach(), before)
    check_nll(nll.detach(), want_nll, case)
    nll.backward(case.upstream)
    check_gradient(gradient_of(base), want_gradient, case)
    if leaf:
        assert torch.equal(base.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_at_both_ends(dtype: torch.dtype) -> None:
    case = make_case(0, s=6, b=2, vocab=50, dtype=dtype)
    signs = torch.randint(0, 2, case.logits.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    case.logits.copy_(signs * 1e4)
    logits = case.logits.clone().requires_grad_()
    want_nll, want_gradient = case.spec()
    nll = token_nll.token_nll(logits, case.labels)
    nll.backward(case.upstream)
    check_nll(nll.detach(), want_nll, case)
    check_gradient(gradient_of(logits), want_gradient, case)


@pytest.mark.parametrize("scale", [1.0, 3.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(dtype: torch.dtype, scale: float) -> None:
    case = make_case(8, s=40, b=3, vocab=90, valid_vocab=83, scale=scale, dtype=dtype)
    logits = case.logits.clone().requires_grad_()
    nll = token_nll.token_nll(logits, case.labels, valid_vocab=case.valid_vocab)
    nll.backward(case.upstream)
    check_no_worse_than_torch(nll.detach(), gradient_of(logits), case)


def test_nothing_waits_for_the_device() -> None:
    """Tensors of the meta device have no values, so code that looks at one raises."""
    with torch.device("meta"):
        hidden, head = torch.empty(12, 4), torch.empty(50, 4).requires_grad_()
        labels, ref_nll, mask = torch.empty(12, dtype=torch.int64), torch.empty(1, 12), torch.ones(1, 12)
        nll = token_nll.token_nll(hidden @ head.t(), labels, valid_vocab=47)[None]
        loss = (remit_weights(nll, ref_nll, mask, segment_ids=torch.zeros(1, 12, dtype=torch.int64)) * nll).sum()
        loss.backward()
        scores = linear_nll(hidden, head, labels, valid_vocab=47, chunk_tokens=5)
    assert gradient_of(head).shape == head.shape
    assert scores.shape == labels.shape


@pytest.mark.parametrize("shape", ["expanded", "transposed"])
def test_upstream_of_any_stride(shape: str) -> None:
    case = make_case(3, s=7, b=3, vocab=40)
    upstream = {
        "expanded": torch.tensor([0.5, -2.0, 0.0]).expand(7, 3),
        "transposed": case.upstream.t().contiguous().t(),
    }[shape]
    case.upstream.copy_(upstream)
    want_gradient = case.spec()[1]
    logits = case.logits.clone().requires_grad_()
    token_nll.token_nll(logits, case.labels).backward(upstream)
    check_gradient(gradient_of(logits), want_gradient, case)


def test_expanded_logits() -> None:
    """One row of logits behind many tokens: its gradient is the sum, and the row itself is not overwritten."""
    case = make_case(4, s=8, b=1, vocab=30)
    row = case.logits[0, 0].clone().requires_grad_()
    spec_row = row.detach().double().requires_grad_()
    scaled = row * 1.0
    token_nll.token_nll(scaled.expand(8, 30), case.labels[:, 0]).backward(case.upstream[:, 0])
    spec.token_nll(spec_row.expand(8, 30), case.labels[:, 0]).backward(case.upstream[:, 0].double())
    torch.testing.assert_close(gradient_of(row).double(), gradient_of(spec_row), rtol=0, atol=8 * 4 * 1e-6)
    assert torch.equal(scaled.detach(), row.detach())


def test_gradient_takes_the_logits_place_only_where_nobody_can_tell() -> None:
    case = make_case(5, s=4, b=2, vocab=20)
    leaf = case.logits.clone().requires_grad_()

    intermediate = leaf * 1
    address = intermediate.data_ptr()
    seen = []
    intermediate.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    nll = token_nll.token_nll(intermediate, case.labels)
    nll.sum().backward(retain_graph=True)
    assert seen == [address]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.sum().backward()

    view_of_leaf = leaf[:, :1]
    before = leaf.detach().clone()
    token_nll.token_nll(view_of_leaf, case.labels[:, :1]).sum().backward()
    assert torch.equal(leaf.detach(), before)

    saved_elsewhere = leaf.exp()  # exp keeps its result for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_nll.token_nll(saved_elsewhere, case.labels).sum().backward()


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), take=st.integers(1, 40))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_row_does_not_depend_on_its_neighbours(seed: int, rows: int, take: int) -> None:
    """Bit for bit, one row alone included, at a width where torch would sum a single row with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        case = make_case(seed, s=rows, b=1, vocab=40_000, dtype=torch.bfloat16)
        whole = token_nll.token_nll(case.logits, case.labels)
        assert torch.equal(token_nll.token_nll(case.logits[:take], case.labels[:take]), whole[:take])
        alone = [token_nll.token_nll(case.logits[i, 0], case.labels[i, 0]) for i in range(rows)]
        assert torch.equal(torch.stack(alone), whole[:, 0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("label", [-1, 20, 23, 10**9])
def test_label_outside_the_vocabulary_is_loud(label: int) -> None:
    logits = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nll = token_nll.token_nll(logits, torch.tensor([3, label]), valid_vocab=20)
    assert nll[0].isfinite()
    assert nll[1].isnan()
    nll.sum().backward()
    assert gradient_of(logits)[0].isfinite().all()
    assert gradient_of(logits)[1, :20].isnan().all()


def test_masked_rows_may_hold_anything() -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.nan
    logits[1] = torch.inf
    logits.requires_grad_()
    nll = token_nll.token_nll(logits, torch.tensor([-100, 5, 6, 7]))
    assert nll[0] == 0
    nll.backward(torch.tensor([3.0, 0.0, 1.0, 2.0]))
    assert not gradient_of(logits)[:2].any()
    assert gradient_of(logits)[2:].isfinite().all()


def test_minus_infinity_in_the_vocabulary() -> None:
    """Columns a model switches off by -inf have probability 0, also where they fill a whole shard."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    logits[:, 5:] = -torch.inf
    labels = torch.tensor([0, 4, 2])
    shard = Shard(first=5, num_local=5, num_valid=5, valid_vocab=10, tp_group=None)
    assert torch.equal(token_nll.local_stats(logits[:, 5:], labels, shard)[0], torch.full((3,), -torch.inf))
    want = spec.token_nll(logits, labels)
    torch.testing.assert_close(token_nll.token_nll(logits, labels).double(), want, rtol=0, atol=1e-6)


def test_no_tokens() -> None:
    logits = torch.zeros(0, 2, 8, requires_grad=True)
    nll = token_nll.token_nll(logits, torch.zeros(0, 2, dtype=torch.int64))
    nll.sum().backward()
    assert nll.shape == (0, 2)
    assert gradient_of(logits).shape == logits.shape


def test_wrong_arguments_are_refused() -> None:
    logits, labels = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="leading shape"):
        token_nll.token_nll(logits, labels[:2])
    with pytest.raises(AssertionError, match="int64"):
        token_nll.token_nll(logits, labels.int())
    with pytest.raises(AssertionError, match="float64"):
        token_nll.token_nll(logits.double(), labels)
    with pytest.raises(AssertionError, match="valid_vocab 9"):
        token_nll.token_nll(logits, labels, valid_vocab=9)
    with pytest.raises(AssertionError, match="unknown implementation"):
        token_nll.token_nll(logits, labels, implementation="tirton")  # type: ignore[arg-type]


def test_implementation_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_implementation("cpu")[0] == "torch"
    assert describe_implementation("cuda")[0] == "triton"
    logits, labels = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match="cannot run on cpu"):
        token_nll.token_nll(logits, labels, implementation="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert describe_implementation("cuda")[0] == "none"
    with pytest.raises(UserError, match="triton is not installed"):
        token_nll.select_kernels("auto", "cuda")
    with pytest.raises(UserError, match="triton is not installed"):
        token_nll.select_kernels("triton", "cuda")
    assert token_nll.select_kernels("torch", "cuda").local_stats is token_nll.torch_local_stats
