"""The head and loss by sequence against whole logits and against float64: values and gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.objectives import TokenStats, build_objective
from remit_megatron.ops import spec
from remit_megatron.ops.linear_loss import linear_loss_by_sequence
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import gradient_of
from tests.ops.test_memory import peak_bytes
from tests.ranks import run_ranks

S, B, H, VOCAB, VALID = 16, 3, 8, 40, 37
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ntp": {"name": "ntp"},
    "remit": {"name": "remit"},
    "by document": {"name": "remit", "centering": "document", "epsilon": 0.5},
}
UPSTREAM = -1.7


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VALID, (B, S), generator=generator)
    labels[0, 3] = spec.IGNORED_LABEL
    mask = (torch.rand(B, S, generator=generator) > 0.3).float()
    mask[1] = 0  # a sample without tokens still takes part
    mask[0, 3] = 0
    return {
        "hidden": torch.randn(S, B, H, generator=generator),
        "weight": torch.randn(VOCAB, H, generator=generator),
        "labels": labels,
        "mask": mask,
        "ref_nll": torch.rand(B, S, generator=generator) * 6,
        "segment_ids": torch.arange(S).expand(B, S) // 6,
    }


def stats_of(batch: dict[str, Tensor], nll: Tensor, rows: slice) -> TokenStats:
    ref_nll, mask, segment_ids = (batch[name][rows] for name in ("ref_nll", "mask", "segment_ids"))
    return TokenStats(nll=nll, ref_nll=ref_nll, mask=mask, segment_ids=segment_ids)


def by_sequence(batch: dict[str, Tensor], settings: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """(loss sum, NLL, gradients of hidden and weight) with this rank's rows of the head."""
    objective = build_objective(settings)
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_()

    def loss_of_sequence(i: int, nll: Tensor) -> Tensor:
        return objective(stats_of(batch, nll, slice(i, i + 1))).loss_sum

    loss_sum, nll = linear_loss_by_sequence(
        hidden, weight, batch["labels"], loss_of_sequence, valid_vocab=VALID, **options
    )
    (loss_sum * UPSTREAM).backward()
    return loss_sum.detach(), nll, gradient_of(hidden), gradient_of(weight)


def by_whole_logits(batch: dict[str, Tensor], settings: dict[str, Any]) -> tuple[Tensor, ...]:
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_()
    nll = token_nll(hidden @ weight.t(), batch["labels"].t(), valid_vocab=VALID).t()
    loss_sum = build_objective(settings)(stats_of(batch, nll, slice(None))).loss_sum
    (loss_sum * UPSTREAM).backward()
    return loss_sum.detach(), nll.detach(), gradient_of(hidden), gradient_of(weight)


def by_specification(batch: dict[str, Tensor], settings: dict[str, Any]) -> tuple[Tensor, ...]:
    hidden, weight = (batch[name].double().requires_grad_() for name in ("hidden", "weight"))
    nll = spec.token_nll(hidden @ weight.t(), batch["labels"].t(), valid_vocab=VALID).t()
    weights = batch["mask"].double()
    if settings["name"] == "remit":
        options = {key: value for key, value in settings.items() if key != "name"}
        weights = spec.remit_weights(nll, batch["ref_nll"], batch["mask"], segment_ids=batch["segment_ids"], **options)
    loss_sum = (weights * nll).sum()
    (loss_sum * UPSTREAM).backward()
    return loss_sum.detach(), nll.detach(), gradient_of(hidden), gradient_of(weight)


def errors(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, float]:
    """Each quantity by the norm of its error, relative to its own norm."""
    names = ("loss", "nll", "hidden", "weight")
    pairs = [(one.double(), other.double()) for one, other in zip(found, want, strict=True)]
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in zip(names, pairs, strict=True)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_specification_and_whole_logits(name: str) -> None:
    batch = make_batch()
    found = by_sequence(batch, OBJECTIVES[name])
    # Float32 products of 8 to 48 terms: a few units of 6e-8.
    for want in (by_specification(batch, OBJECTIVES[name]), by_whole_logits(batch, OBJECTIVES[name])):
        assert max(errors(found, want).values()) <= 1e-6
    assert not found[2][:, 1].any()


def test_bfloat16() -> None:
    batch = make_batch()
    batch |= {name: batch[name].bfloat16() for name in ("hidden", "weight")}
    found = by_sequence(batch, OBJECTIVES["remit"])
    want = by_specification(batch, OBJECTIVES["remit"])
    own = errors(found, want)
    usual = errors(by_whole_logits(batch, OBJECTIVES["remit"]), want)
    # Whole logits round too; by sequence, the upstream gradient and each further sample round once more, by 2^-9.
    assert all(own[name] <= usual[name] + 2**-9 for name in own), (own, usual)
    assert (found[2].dtype, found[3].dtype) == (torch.bfloat16, torch.bfloat16)


def test_without_gradient() -> None:
    batch = make_batch()
    with torch.no_grad():
        loss_sum, nll = linear_loss_by_sequence(
            batch["hidden"], batch["weight"], batch["labels"], lambda i, nll: nll.sum(), valid_vocab=VALID
        )
    want = token_nll(batch["hidden"] @ batch["weight"].t(), batch["labels"].t(), valid_vocab=VALID).t()
    torch.testing.assert_close(nll, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_sum, want.sum(), rtol=1e-6, atol=0)


def test_memory_is_one_sequence_of_logits() -> None:
    s, b, vocab = 512, 8, 8192
    hidden, weight = torch.randn(s, b, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    labels = torch.zeros(b, s, dtype=torch.int64)
    peak = peak_bytes(lambda: linear_loss_by_sequence(hidden, weight, labels, lambda i, nll: nll.sum()))
    one_sequence = s * vocab * 4
    assert one_sequence <= peak <= 1.15 * one_sequence  # of eight; the working copy has a floor of 1 MiB


def on_rank(rank: int) -> dict[str, tuple[Tensor, ...]]:
    batch = make_batch()
    batch["weight"] = batch["weight"].chunk(2)[rank]
    return {name: by_sequence(batch, settings, tp_group=dist.group.WORLD) for name, settings in OBJECTIVES.items()}


def test_tensor_parallel() -> None:
    results = run_ranks(2, on_rank)
    for name, settings in OBJECTIVES.items():
        ranks = [one[name] for one in results]
        assert torch.equal(ranks[0][1], ranks[1][1])
        hidden_gradient = ranks[0][2] + ranks[1][2]
        weight_gradient = torch.cat([one[3] for one in ranks])
        found = (*ranks[0][:2], hidden_gradient, weight_gradient)
        assert max(errors(found, by_specification(make_batch(), settings)).values()) <= 1e-6


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, labels = torch.zeros(4, 2, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(AssertionError, match=r"labels .* must be \[b, s\]"):
        linear_loss_by_sequence(hidden, weight, labels.t(), lambda i, nll: nll.sum())
    with pytest.raises(AssertionError, match="does not fit"):
        linear_loss_by_sequence(hidden, weight[:, :2], labels, lambda i, nll: nll.sum())
