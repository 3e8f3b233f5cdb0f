"""KL and NLL from chunks and shards against the float64 specification, values and gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops import spec
from remit_megatron.ops.distillation import Teacher, nll_and_kl
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import Case, gradient_of, make_case
from tests.ranks import run_ranks

S, B, H, VOCAB = 9, 3, 16, 64


def make(dtype: torch.dtype = torch.float32, valid_vocab: int = 61) -> tuple[Case, Tensor, Tensor, Tensor]:
    """Student's logits and labels, the reference's hidden states [s, b, h] and head [V, h], upstream of the KL [s, b].

    The head's padding rows are large, so that counting one shows.
    """
    case = make_case(5, s=S, b=B, vocab=VOCAB, valid_vocab=valid_vocab, dtype=dtype)
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, H, generator=generator).to(dtype)
    weight[valid_vocab:] = 100.0
    return case, hidden, weight, torch.rand(S, B, generator=generator) - 0.3


def expected(temperature: float, dtype: torch.dtype = torch.float32, valid_vocab: int = 61) -> tuple[Tensor, Tensor]:
    """[2, s, b] and the gradient [s, b, V], float64."""
    case, hidden, weight, upstream = make(dtype, valid_vocab)
    logits = case.logits.double().requires_grad_()
    nll = spec.token_nll(logits, case.labels, valid_vocab=valid_vocab)
    # The reference's logits are rounded to the head's dtype, as they are where they are whole.
    reference_logits = hidden @ weight.t()
    kl = spec.forward_kl(logits, reference_logits, valid_vocab=valid_vocab, temperature=temperature)
    kl = kl.masked_fill(case.labels == spec.IGNORED_LABEL, 0.0)
    both = torch.stack([nll, kl])
    both.backward(torch.stack([case.upstream, upstream]).double())
    return both.detach(), gradient_of(logits)


def run(
    temperature: float,
    chunk_tokens: int,
    dtype: torch.dtype,
    columns: slice = slice(None),
    top_k: int = 0,
    **settings: Any,
) -> Any:
    case, hidden, weight, upstream = make(dtype, settings.get("valid_vocab", 61))
    logits = case.logits[..., columns].clone().requires_grad_()
    before = logits.detach().clone()
    scale: Any = {"temperature": temperature, "chunk_tokens": chunk_tokens, "top_k": top_k}
    teacher = Teacher(hidden=hidden, weight=weight[columns], **scale)
    result = nll_and_kl(logits, case.labels, teacher, **{"valid_vocab": 61, **settings})
    result.backward(torch.stack([case.upstream, upstream]))
    assert torch.equal(logits.detach(), before), "a leaf must be left as it is"
    return result.detach(), gradient_of(logits)


def check(result: Tensor, gradient: Tensor, want: Tensor, want_gradient: Tensor, dtype: torch.dtype) -> None:
    # float32 sums of differences of logits of magnitude 15 to 20; the gradient is then rounded to its dtype.
    torch.testing.assert_close(result.double(), want, rtol=0, atol=2e-5)
    rounding = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_specification(temperature: float, chunk_tokens: int, dtype: torch.dtype) -> None:
    result, gradient = run(temperature, chunk_tokens, dtype)
    want, want_gradient = expected(temperature, dtype)
    assert (want[1].abs() > 0.1).sum() > 10
    check(result, gradient, want, want_gradient, dtype)
    assert gradient.dtype == dtype
    assert not gradient[..., 61:].any()
    assert not gradient[make(dtype)[0].labels == spec.IGNORED_LABEL].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_kl_it_is_token_nll_bit_for_bit(dtype: torch.dtype) -> None:
    case, hidden, weight, _ = make(dtype)
    gradients = []
    for distil in (True, False):
        leaf = case.logits.clone().requires_grad_()
        logits = leaf * 1.0  # an intermediate result, which backward may overwrite
        if distil:
            teacher = Teacher(hidden=hidden, weight=weight, chunk_tokens=4)
            nll, kl = nll_and_kl(logits, case.labels, teacher, valid_vocab=61).unbind()
            (1.0 * nll + 0.0 * kl).backward(case.upstream)
        else:
            nll = token_nll(logits, case.labels, valid_vocab=61, implementation="torch")
            nll.backward(case.upstream)
        gradients.append((nll.detach(), gradient_of(leaf)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_the_student_itself_has_no_kl() -> None:
    _, hidden, weight, _ = make()
    weight[61:] = 0
    logits = (hidden @ weight.t()).requires_grad_()
    teacher = Teacher(hidden=hidden, weight=weight)
    kl = nll_and_kl(logits, torch.zeros(S, B, dtype=torch.int64), teacher, valid_vocab=61)[1]
    kl.sum().backward()
    assert not kl.any()
    assert not gradient_of(logits).any()


def sharded(rank: int, temperature: float) -> dict[int, tuple[Tensor, Tensor]]:
    """Columns over four ranks; with 33 valid columns the last of them has none, and one has a single one."""
    columns = slice(rank * VOCAB // 4, (rank + 1) * VOCAB // 4)
    group = dist.group.WORLD
    return {valid: run(temperature, 5, torch.float32, columns, valid_vocab=valid, tp_group=group) for valid in (61, 33)}


@pytest.mark.parametrize("temperature", [1.3])
def test_sharded_vocabulary(temperature: float) -> None:
    """Every rank has the whole KL, and its own columns of softmax(student) - softmax(reference)."""
    results = run_ranks(4, sharded, temperature)
    for valid in (61, 33):
        want, want_gradient = expected(temperature, valid_vocab=valid)
        for result in results:
            assert torch.equal(result[valid][0], results[0][valid][0])
        gradient = torch.cat([result[valid][1] for result in results], dim=-1)
        check(results[0][valid][0], gradient, want, want_gradient, torch.float32)


def top_k_spec(k: int, temperature: float, valid_vocab: int = 61) -> tuple[Tensor, Tensor, Tensor]:
    """[2, s, b], the gradient [s, b, V], and the KL over the whole vocabulary, float64: k outcomes and all others."""
    case, hidden, weight, upstream = make(valid_vocab=valid_vocab)
    logits = case.logits.double().requires_grad_()
    nll = spec.token_nll(logits, case.labels, valid_vocab=valid_vocab)
    q = ((hidden @ weight.t()).double()[..., :valid_vocab] / temperature).softmax(-1)
    p = (logits[..., :valid_vocab] / temperature).softmax(-1)
    best = q.topk(min(k, valid_vocab), dim=-1).indices
    of_best = (q.gather(-1, best) * (q / p).gather(-1, best).log()).sum(-1)
    q_tail, p_tail = (x.scatter(-1, best, 0.0).sum(-1) for x in (q, p))
    kl = of_best + q_tail * (q_tail / p_tail).log() if k < valid_vocab else of_best
    ignored = case.labels == spec.IGNORED_LABEL
    both = torch.stack([nll, kl.masked_fill(ignored, 0.0)])
    both.backward(torch.stack([case.upstream, upstream]).double())
    whole = (q * (q / p).log()).sum(-1).detach().masked_fill(ignored, 0.0)
    return both.detach(), gradient_of(logits), whole


@pytest.mark.parametrize("k", [1, 3, 20, 60])
def test_top_k(k: int) -> None:
    """Against the definition; a lower bound of the whole KL that rises with k."""
    result, gradient = run(1.7, 4, torch.float32, top_k=k)
    want, want_gradient, whole = top_k_spec(k, 1.7)
    check(result, gradient, want, want_gradient, torch.float32)
    assert (result[1] <= whole + 2e-5).all()
    if k < 20:
        more = run(1.7, 4, torch.float32, top_k=20)[0]
        assert (result[1] < more[1] - 1e-3).sum() > 10
        assert (result[1] <= more[1] + 2e-5).all()


@pytest.mark.parametrize("k", [61, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_of_everything_is_the_whole_kl(k: int, dtype: torch.dtype) -> None:
    result, gradient = run(1.7, 4, dtype, top_k=k)
    want, want_gradient = expected(1.7, dtype)
    check(result, gradient, want, want_gradient, dtype)


def sharded_top_k(rank: int, ks: list[int]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    columns = slice(rank * VOCAB // 4, (rank + 1) * VOCAB // 4)
    group = dist.group.WORLD
    return {
        (valid, k): run(1.3, 5, torch.float32, columns, top_k=k, valid_vocab=valid, tp_group=group)
        for valid in (61, 33)
        for k in ks
    }


def test_top_k_over_a_sharded_vocabulary() -> None:
    """The k may be anywhere: on one rank or on several; more of them than a rank has columns; a rank has none."""
    ks = [1, 5, 30, 200]
    results = run_ranks(4, sharded_top_k, ks)
    for valid in (61, 33):
        for k in ks:
            want, want_gradient, _ = top_k_spec(k, 1.3, valid)
            found = [result[valid, k] for result in results]
            assert all(torch.equal(one[0], found[0][0]) for one in found)
            check(found[0][0], torch.cat([g for _, g in found], dim=-1), want, want_gradient, torch.float32)


def test_top_k_with_a_confident_student() -> None:
    """The student's tail is far below float32's smallest step around 1, the reference's is not."""
    _, hidden, weight, _ = make()
    logits = torch.zeros(S, B, VOCAB)
    reference_logits = (hidden @ weight.t())[..., :61]
    best = reference_logits.argmax(-1, keepdim=True)
    logits.scatter_(-1, best, 60.0)
    exact = logits.double().requires_grad_()
    q, log_p = reference_logits.double().softmax(-1).gather(-1, best), exact[..., :61].log_softmax(-1)
    tail = log_p.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
    want = (q * (q.log() - log_p.gather(-1, best)) + (1 - q) * ((1 - q).log() - tail))[..., 0]
    want.sum().backward()
    leaf = logits.clone().requires_grad_()
    teacher = Teacher(hidden=hidden, weight=weight, top_k=1)
    kl = nll_and_kl(leaf, torch.zeros(S, B, dtype=torch.int64), teacher, valid_vocab=61)[1]
    kl.sum().backward()
    assert want.max() > 10
    # Float32 sums of logits of 60.
    torch.testing.assert_close(kl.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_of(leaf).double(), gradient_of(exact), rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_refused() -> None:
    case, hidden, weight, _ = make()
    for teacher, message in (
        (Teacher(hidden=hidden[:4], weight=weight), "must be of the tokens"),
        (Teacher(hidden=hidden, weight=weight[:8]), "columns"),
        (Teacher(hidden=hidden, weight=weight, temperature=0.0), "temperature"),
    ):
        with pytest.raises(AssertionError, match=message):
            nll_and_kl(case.logits, case.labels, teacher)
