"""Kept distributions: what is kept, and how it is compared, against plain float64 code; values and gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.distillation_kept import KeptTeacher, nll_and_kept_kl
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.score_quanta import round_to_quanta
from remit_megatron.ops.shard import IGNORED_LABEL
from remit_megatron.ops.token_nll import token_nll
from remit_megatron.ops.top_tokens import Summary, TopTokens, summarise
from tests.ops.cases import Case, gradient_of
from tests.ops.test_distillation import VOCAB, B, S, make
from tests.ranks import run_ranks

VALID = 61
COMPARED = ("forward", "reverse", "top1")


def summary(top_k: int, temperature: float, valid: int = VALID, columns: slice = slice(None), **more: Any) -> Summary:
    case, hidden, weight, _ = make(valid_vocab=valid)
    return summarise(
        hidden.flatten(0, 1),
        weight[columns],
        case.labels.flatten(),
        **{"top_k": top_k, "temperature": temperature, "valid_vocab": valid, "chunk_tokens": 7, **more},
    )


def shaped(top: TopTokens) -> TopTokens:
    return TopTokens(
        ids=top.ids.view(S, B, -1), log_probs=top.log_probs.view(S, B, -1), log_tail=top.log_tail.view(S, B)
    )


def compared_plainly(compare: str, case: Case, top: TopTokens, temperature: float) -> Tensor:
    """[2, s, b] float64 with a graph in case.logits: K outcomes and one for the rest of the vocabulary."""
    x = case.logits[..., : case.valid_vocab]
    kept = case.labels != IGNORED_LABEL
    nll = -x.log_softmax(-1).gather(-1, case.labels.clamp(min=0)[..., None])[..., 0]
    ids = top.ids.long()
    if compare == "top1":
        value = -x.log_softmax(-1).gather(-1, ids[..., :1])[..., 0]
        return torch.stack([nll, value]).where(kept, 0.0)
    log_p = (x / temperature).log_softmax(-1)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids, False)
    p_tail = log_p.masked_fill(~outside, -1e300).logsumexp(-1, keepdim=True)  # -inf would have no gradient
    log_p = torch.cat([log_p.gather(-1, ids), p_tail], dim=-1)
    log_q = torch.cat([top.log_probs, top.log_tail[..., None]], dim=-1).double().log_softmax(-1)
    covers = ids.shape[-1] == case.valid_vocab
    log_p, log_q = (log_p[..., :-1], log_q[..., :-1]) if covers else (log_p, log_q)
    one, other = (log_q, log_p) if compare == "forward" else (log_p, log_q)
    terms = one.exp() * (one - other)
    return torch.stack([nll, terms.sum(-1)]).where(kept, 0.0)


def run(
    compare: Any,
    temperature: float,
    top: TopTokens,
    dtype: torch.dtype = torch.float32,
    valid: int = VALID,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    case, _, _, upstream = make(dtype, valid)
    leaf = case.logits[..., more.pop("columns", slice(None))].clone().requires_grad_()
    logits = leaf * 1.0  # an intermediate result, which backward may overwrite
    teacher = KeptTeacher(top=shaped(top), temperature=temperature, compare=compare)
    result = nll_and_kept_kl(logits, case.labels, teacher, valid_vocab=valid, **more)
    result.backward(torch.stack([case.upstream, upstream]))
    return result.detach(), gradient_of(leaf)


def expected(
    compare: str, temperature: float, top: TopTokens, dtype: torch.dtype = torch.float32, valid: int = VALID
) -> tuple[Tensor, Tensor]:
    case, _, _, upstream = make(dtype, valid)
    leaf = case.logits.double().requires_grad_()
    want = compared_plainly(compare, Case(leaf, case.labels, case.upstream, valid), shaped(top), temperature)
    want.backward(torch.stack([case.upstream, upstream]).double())
    return want.detach(), gradient_of(leaf)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> None:
    # float32 sums of terms of magnitude 15 to 20; the gradient is then rounded to its dtype.
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=2e-5)
    rounding = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[1].double(), want[1], rtol=rounding, atol=1e-5)
    assert not got[1][make(dtype)[0].labels == IGNORED_LABEL].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 9, VALID])
def test_what_is_kept(top_k: int, temperature: float) -> None:
    case, hidden, weight, _ = make()
    logits = (hidden @ weight.t()).flatten(0, 1)[:, :VALID]
    found = summary(top_k, temperature)
    log_q = (logits.double() / temperature).log_softmax(-1)
    want, order = log_q.sort(dim=-1, descending=True)
    assert torch.equal(found.top.ids.long(), order[:, :top_k])
    # Half a quantum of 2^-11, but for what lies beyond the largest that there is.
    near = want[:, :top_k] > -31.99
    assert (found.top.log_probs - want[:, :top_k])[near].abs().max() <= 2**-12 + 1e-5
    assert torch.equal(found.top.log_probs, -round_to_quanta(-found.top.log_probs))
    tail = want[:, top_k:].logsumexp(-1) if top_k < VALID else torch.full(logits.shape[:1], -torch.inf).double()
    torch.testing.assert_close(found.top.log_tail.double(), tail, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), -(log_q.exp() * log_q).sum(-1), rtol=0, atol=2e-5)
    same = linear_nll(hidden.flatten(0, 1), weight, case.labels.flatten(), valid_vocab=VALID, chunk_tokens=7)
    assert torch.equal(found.nll, same)


def test_of_equal_ones_the_first_column_comes_first() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0], [2.0], [1.0]])
    found = summarise(torch.ones(1, 1), weight, torch.zeros(1, dtype=torch.int64), top_k=5)
    assert found.top.ids.tolist() == [[1, 2, 4, 0, 5]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 9, VALID])
@pytest.mark.parametrize("compare", COMPARED)
def test_matches_plain_code(compare: str, top_k: int, temperature: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        top = summary(top_k, temperature).top
        check(run(compare, temperature, top, dtype), expected(compare, temperature, top, dtype), dtype)


@pytest.mark.parametrize("compare", COMPARED)
def test_extreme_tails(compare: str) -> None:
    """A reference's tail far above the student's, whose own is beyond float32 for some tokens, and far below it."""
    top = summary(4, 1.0).top
    for log_tail, scale in ((-1.0, 40.0), (-60.0, 1.0)):
        case, _, _, upstream = make()
        leaf = (case.logits * scale).requires_grad_()
        changed = TopTokens(ids=top.ids, log_probs=top.log_probs, log_tail=torch.full_like(top.log_tail, log_tail))
        teacher = KeptTeacher(top=shaped(changed), compare=compare)  # type: ignore[arg-type]
        got = nll_and_kept_kl(leaf, case.labels, teacher, valid_vocab=VALID)
        got.backward(torch.stack([case.upstream, upstream]))
        exact = leaf.detach().double().requires_grad_()
        of_exact = Case(exact, case.labels, case.upstream, VALID)
        want = compared_plainly(compare, of_exact, shaped(changed), 1.0)
        want.backward(torch.stack([case.upstream, upstream]).double())
        # Logits of several hundreds are known to 3e-5 in float32.
        torch.testing.assert_close(got.detach().double(), want.detach(), rtol=1e-5, atol=2e-5 * scale)
        torch.testing.assert_close(gradient_of(leaf).double(), gradient_of(exact), rtol=1e-3, atol=1e-5 * scale)


def test_only_what_is_wanted_is_compared() -> None:
    top = summary(9, 2.0).top
    wanted = torch.rand(S, B, generator=torch.Generator().manual_seed(1)) < 0.3
    value, gradient = run("reverse", 2.0, top, compared=wanted)
    whole, of_whole = run("reverse", 2.0, top)
    assert torch.equal(value[0], whole[0])
    assert torch.equal(value[1], whole[1].where(wanted, 0.0))
    torch.testing.assert_close(gradient[wanted], of_whole[wanted], rtol=0, atol=1e-7)
    case = make()[0]
    leaf = case.logits.clone().requires_grad_()
    token_nll(leaf * 1.0, case.labels, valid_vocab=VALID, implementation="torch").backward(case.upstream)
    assert torch.equal(gradient[~wanted], gradient_of(leaf)[~wanted])


def sharded(rank: int) -> dict[Any, Any]:
    """Columns over the ranks; with 33 valid columns the last of four has none, and one has a single one."""
    size = dist.get_world_size()
    columns, group = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size), dist.group.WORLD
    found: dict[Any, Any] = {}
    for valid in (61, 33):
        for top_k in (5, 33):
            kept = summary(top_k, 2.0, valid, columns, tp_group=group)
            found[valid, top_k] = kept
            for compare in COMPARED:
                found[valid, top_k, compare] = run(compare, 2.0, kept.top, valid=valid, columns=columns, tp_group=group)
    return found


def test_vocabulary_over_ranks() -> None:
    results = run_ranks(4, sharded)
    for key, want in results[0].items():
        if len(key) == 2:
            whole = summary(key[1], 2.0, key[0])
            for found in (result[key] for result in results):
                assert torch.equal(found.top.ids, whole.top.ids)
                # Another order of sums may round a log-probability to the next quantum.
                torch.testing.assert_close(found.top.log_probs, whole.top.log_probs, rtol=0, atol=2**-11 + 1e-6)
                for name in ("nll", "entropy"):
                    assert torch.equal(getattr(found, name), getattr(want, name)), "all ranks have the same bits"
                    torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=0, atol=2e-5)
                torch.testing.assert_close(found.top.log_tail, whole.top.log_tail, rtol=0, atol=2e-5)
            continue
        valid, top_k, compare = key
        gradient = torch.cat([result[key][1] for result in results], dim=-1)
        assert all(torch.equal(result[key][0], want[0]) for result in results)
        plain = expected(compare, 2.0, results[0][valid, top_k].top, valid=valid)
        torch.testing.assert_close(want[0].double(), plain[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(gradient.double(), plain[1], rtol=1e-6, atol=1e-5)
