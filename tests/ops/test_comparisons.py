"""Every comparison of reference and student, and the reference's entropy, against plain float64, values and gradients,
on one rank and with the vocabulary over two and four."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.distillation import Teacher, nll_and_kl
from remit_megatron.ops.distillation_entropy import entropy_and_top
from remit_megatron.ops.shard import cut_again
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import gradient_of
from tests.ops.groups import SIZES, make_groups
from tests.ops.test_distillation import VOCAB, B, H, S, check, make
from tests.ranks import run_ranks

TAU = 1.7
OTHER_ROWS = (50, 70)
KINDS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"compare": "reverse"},
    "reverse top 1": {"compare": "reverse", "top_k": 1},
    "reverse top 5": {"compare": "reverse", "top_k": 5},
    "reverse top 30": {"compare": "reverse", "top_k": 30},
    "reverse top all": {"compare": "reverse", "top_k": 200},
    "top1": {"compare": "top1"},
}


def plain(kind: dict[str, Any], logits: Tensor, reference: Tensor) -> Tensor:
    """[s, b] float64, from logits of the valid columns, in one line or two each."""
    if kind.get("compare") == "top1":
        best = reference.argmax(-1, keepdim=True)
        return -logits.log_softmax(-1).gather(-1, best)[..., 0]
    log_p, log_q = (logits / TAU).log_softmax(-1), (reference / TAU).log_softmax(-1)
    if kind.get("top_k"):
        best = log_q.topk(min(kind["top_k"], log_q.shape[-1]), dim=-1).indices
        log_p, log_q = (
            torch.cat([x.gather(-1, best), x.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            if best.shape[-1] < x.shape[-1]
            else x
            for x in (log_p, log_q)
        )
    if kind.get("compare") == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def wanted() -> Tensor:
    """[s, b] bool: not all, with ignored tokens on both sides."""
    return torch.rand(S, B, generator=torch.Generator().manual_seed(8)) < 0.4


def expected(kind: dict[str, Any], valid: int, some: bool) -> tuple[Tensor, Tensor]:
    """[2, s, b] and the gradient [s, b, V]."""
    case, hidden, weight, upstream = make(valid_vocab=valid)
    logits = case.logits.double().requires_grad_()
    ignored = case.labels == -100
    nll = -logits[..., :valid].log_softmax(-1).gather(-1, case.labels.clamp(min=0)[..., None])[..., 0]
    kl = plain(kind, logits[..., :valid], (hidden @ weight.t()).double()[..., :valid])
    left_out = ignored | ~wanted() if some else ignored
    both = torch.stack([nll.masked_fill(ignored, 0.0), kl.masked_fill(left_out, 0.0)])
    both.backward(torch.stack([case.upstream, upstream]).double())
    return both.detach(), gradient_of(logits)


def run(kind: dict[str, Any], valid: int, some: bool, columns: slice, group: Any) -> tuple[Tensor, Tensor]:
    case, hidden, weight, upstream = make(valid_vocab=valid)
    leaf = case.logits[..., columns].clone().requires_grad_()
    teacher = Teacher(hidden=hidden, weight=weight[columns], temperature=TAU, chunk_tokens=4, **kind)
    logits = leaf * 1.0  # an intermediate result, which backward overwrites
    result = nll_and_kl(
        logits, case.labels, teacher, compared=wanted() if some else None, valid_vocab=valid, tp_group=group
    )
    result.backward(torch.stack([case.upstream, upstream]))
    return result.detach(), gradient_of(leaf)


def on_ranks(rank: int) -> dict[Any, tuple[Tensor, Tensor]]:
    """With 33 valid columns one of four ranks has none of them, and one a single one."""
    found: dict[Any, tuple[Tensor, Tensor]] = {}
    for size, group in make_groups(rank).items():
        place, width = rank % size, VOCAB // size
        columns = slice(place * width, (place + 1) * width)
        for name, kind in KINDS.items():
            for valid in (61, 33):
                for some in (False, True):
                    found[size, name, valid, some] = run(kind, valid, some, columns, group if size > 1 else None)
        found |= of_other_rows(size, place, group if size > 1 else None)
    return found


def reference_of(rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states [s, b, h] and a head [rows, h] of a reference with another number of rows than the student."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(S, B, H, generator=generator), torch.randn(72, H, generator=generator)[:rows]


def of_other_rows(size: int, place: int, group: Any) -> dict[tuple[int, str, int], tuple[Tensor, Tensor]]:
    """A student of 61 rows in 64 columns, against references of fewer and of more; padded to whole shards with rows
    that show where they are counted."""
    found = {}
    for rows in OTHER_ROWS:
        case, _, _, upstream = make(valid_vocab=61)
        hidden, head = reference_of(rows)
        padded = torch.full((-(-rows // size) * size, H), 100.0)
        padded[:rows] = head
        theirs, width = len(padded) // size, VOCAB // size
        weight = cut_again(padded[place * theirs : (place + 1) * theirs], width, group)
        for name, kind in KINDS.items():
            leaf = case.logits[..., place * width : (place + 1) * width].clone().requires_grad_()
            teacher = Teacher(
                hidden=hidden, weight=weight, valid_vocab=min(rows, 61), temperature=TAU, chunk_tokens=4, **kind
            )
            result = nll_and_kl(leaf * 1.0, case.labels, teacher, valid_vocab=61, tp_group=group)
            result.backward(torch.stack([case.upstream, upstream]))
            found[size, name, rows] = result.detach(), gradient_of(leaf)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, tuple[Tensor, Tensor]]]:
    return run_ranks(4, on_ranks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_matches_plain_code(ranks: Any, name: str, size: int) -> None:
    for valid in (61, 33):
        for some in (False, True):
            found = [result[size, name, valid, some] for result in ranks[:size]]
            assert all(torch.equal(one, found[0][0]) for one, _ in found), "all ranks have the same bits"
            want, want_gradient = expected(KINDS[name], valid, some)
            assert (want[1] > 0.05).sum() > 5
            check(found[0][0], torch.cat([g for _, g in found], dim=-1), want, want_gradient, torch.float32)


@pytest.mark.parametrize("rows", OTHER_ROWS)
@pytest.mark.parametrize("name", KINDS)
def test_common_rows(ranks: Any, name: str, rows: int) -> None:
    """The comparison is over the rows that both have, the NLL over all of the student's."""
    case, _, _, upstream = make(valid_vocab=61)
    hidden, head = reference_of(rows)
    common, ignored, logits = min(rows, 61), case.labels == -100, case.logits.double().requires_grad_()
    nll = -logits[..., :61].log_softmax(-1).gather(-1, case.labels.clamp(min=0)[..., None])[..., 0]
    kl = plain(KINDS[name], logits[..., :common], (hidden @ head.t()).double()[..., :common])
    want = torch.stack([nll, kl]).masked_fill(ignored, 0.0)
    want.backward(torch.stack([case.upstream, upstream]).double())
    for size in SIZES:
        found = [result[size, name, rows] for result in ranks[:size]]
        assert all(torch.equal(one, found[0][0]) for one, _ in found), "all ranks have the same bits"
        check(found[0][0], torch.cat([g for _, g in found], -1), want.detach(), gradient_of(logits), torch.float32)


@pytest.mark.parametrize("kind", ["reverse", "reverse top 5"])
def test_the_student_itself_is_at_no_distance(kind: str) -> None:
    _, hidden, weight, _ = make()
    weight[61:] = 0
    logits = (hidden @ weight.t()).requires_grad_()
    teacher = Teacher(hidden=hidden, weight=weight, **KINDS[kind])
    kl = nll_and_kl(logits, torch.zeros(S, B, dtype=torch.int64), teacher, valid_vocab=61)[1]
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert gradient_of(logits).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_token_compared_it_is_token_nll_bit_for_bit(dtype: torch.dtype) -> None:
    case, hidden, weight, _ = make(dtype)
    leaves = [case.logits.clone().requires_grad_() for _ in range(2)]
    nothing = torch.zeros(S, B, dtype=torch.bool)
    teacher = Teacher(hidden=hidden, weight=weight, compare="reverse", temperature=2.0, chunk_tokens=4)
    nll, kl = nll_and_kl(leaves[0] * 1.0, case.labels, teacher, compared=nothing, valid_vocab=61).unbind()
    (nll + 4.0 * kl).backward(case.upstream)
    plain_nll = token_nll(leaves[1] * 1.0, case.labels, valid_vocab=61, implementation="torch")
    plain_nll.backward(case.upstream)
    assert not kl.any()
    assert torch.equal(nll, plain_nll)
    assert torch.equal(gradient_of(leaves[0]), gradient_of(leaves[1]))


def entropies(rank: int) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    _, hidden, weight, _ = make()
    found = {}
    for size, group in make_groups(rank).items():
        place, width = rank % size, VOCAB // size
        for valid in (61, 33):
            part = weight[place * width : (place + 1) * width]
            found[size, valid] = entropy_and_top(
                hidden.flatten(0, 1), part, temperature=TAU, valid_vocab=valid, tp_group=group, chunk_tokens=5
            )
    return found


def test_entropy_and_most_probable_token() -> None:
    _, hidden, weight, _ = make()
    results = run_ranks(4, entropies)
    for size in SIZES:
        for valid in (61, 33):
            logits = (hidden @ weight.t()).double().flatten(0, 1)[:, :valid]
            p = (logits / TAU).softmax(-1)
            for result in results:
                entropy, top = result[size, valid]
                # Float32 sums of positive terms.
                torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=2e-6, atol=1e-6)
                assert torch.equal(top, logits.argmax(-1))


def ties(rank: int) -> Tensor:
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0], [3.0], [0.0]] * 2)
    return entropy_and_top(hidden, weight[4 * rank : 4 * rank + 4], valid_vocab=8, tp_group=dist.group.WORLD)[1]


def test_of_equally_probable_tokens_the_first() -> None:
    assert [result.tolist() for result in run_ranks(2, ties)] == [[1], [1]]
