"""The chunked head against the float64 specification and, bit for bit, against the whole logits."""

import pytest
import torch

from remit_megatron.ops import spec
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll


def make_head(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).to(dtype)
    weight = (torch.randn(101, 24, generator=generator) * 0.5).to(dtype)
    labels = torch.randint(0, 90, (37,), generator=generator)
    labels[::6] = spec.IGNORED_LABEL
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 4096])
def test_matches_specification(chunk_tokens: int) -> None:
    hidden, weight, labels = make_head(torch.float32)
    nll = linear_nll(
        hidden.requires_grad_(), weight.requires_grad_(), labels, valid_vocab=90, chunk_tokens=chunk_tokens
    )
    want = spec.token_nll(hidden.double() @ weight.double().t(), labels, valid_vocab=90)
    # The product of 24 terms and the log-sum-exp, at logits of magnitude 10.
    torch.testing.assert_close(nll.double(), want.detach(), rtol=0, atol=2e-5)
    assert not nll.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_has_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    """Neutrality rests on it: a reference equal to the student must give a gap of exactly 0."""
    hidden, weight, labels = make_head(dtype)
    whole = token_nll(hidden @ weight.t(), labels, valid_vocab=90)
    assert torch.equal(linear_nll(hidden, weight, labels, valid_vocab=90), whole)
    student = token_nll((hidden.view(37, 1, 24) @ weight.t()), labels.view(37, 1), valid_vocab=90)
    assert torch.equal(student.view(37), whole)


def test_no_tokens() -> None:
    nll = linear_nll(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.int64))
    assert nll.shape == (0,)


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, labels = make_head(torch.float32)
    with pytest.raises(AssertionError, match="hidden"):
        linear_nll(hidden[:, :5], weight, labels)
    with pytest.raises(AssertionError, match="labels"):
        linear_nll(hidden, weight, labels[:5])
    with pytest.raises(AssertionError, match="chunk_tokens"):
        linear_nll(hidden, weight, labels, chunk_tokens=0)
