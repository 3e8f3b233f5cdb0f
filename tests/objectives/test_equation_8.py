"""Equation 8: at a fixed context, ReMiT's gradient is Z_w times the gradient of KL(q_w || student)."""

import torch
from torch import Tensor

from remit_megatron.objectives import TokenStats
from remit_megatron.objectives.remit import Remit
from remit_megatron.ops import spec
from remit_megatron.ops.token_nll import token_nll
from tests.ops.cases import gradient_of

VOCAB = 7


def make_distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, reference logits [VOCAB] float64, and counts of each token in the data."""
    generator = torch.Generator().manual_seed(0)
    student, ref = (torch.randn(VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, ref, torch.tensor([5, 1, 0, 3, 2, 4, 1])


def scaled_kl_gradient(student: Tensor, data: Tensor, weights: Tensor) -> Tensor:
    """Z_w times d KL(q_w || softmax(student)) / d student, from the definition of q_w (Equation 7)."""
    student = student.clone().requires_grad_()
    z_w = (data * weights).sum()
    q_w = data * weights / z_w
    kl = torch.xlogy(q_w, q_w).sum() - (q_w * student.log_softmax(dim=0)).sum()
    (gradient,) = torch.autograd.grad(z_w * kl, student)
    return gradient


def test_specification() -> None:
    student, ref, counts = make_distributions()
    student.requires_grad_()
    tokens = torch.arange(VOCAB).repeat_interleave(counts)  # the data: one row of logits behind every token
    mask = torch.ones(1, len(tokens))
    nll = spec.token_nll(student.expand(1, len(tokens), VOCAB), tokens[None])
    ref_nll = spec.token_nll(ref.expand(1, len(tokens), VOCAB), tokens[None])
    weights = spec.remit_weights(nll, ref_nll, mask, epsilon=0.5)
    (gradient,) = torch.autograd.grad(spec.loss(nll, weights, mask), student)

    # The weights over the vocabulary, computed without the specification.
    gap = (ref.log_softmax(dim=0) - student.log_softmax(dim=0)).detach()
    data = counts / counts.sum().double()
    weight_of_token = (2 / (1 + torch.exp((data * gap).sum() - gap))).clamp(0.5, 1.5)
    assert weight_of_token.std() > 0.1
    want = scaled_kl_gradient(student.detach(), data, weight_of_token)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-10)


def test_program() -> None:
    """The same through the float32 operations and the objective."""
    student, ref, counts = make_distributions()
    tokens = torch.arange(VOCAB).repeat_interleave(counts)
    logits = student.float().requires_grad_()
    nll = token_nll(logits.expand(1, len(tokens), VOCAB), tokens[None])
    ref_nll = token_nll(ref.float().expand(1, len(tokens), VOCAB), tokens[None])
    result = Remit(epsilon=0.5)(TokenStats(nll=nll, ref_nll=ref_nll, mask=torch.ones(1, len(tokens))))
    (result.loss_sum / result.num_tokens).backward()

    gap = (ref.log_softmax(dim=0) - student.log_softmax(dim=0)).detach()
    data = counts / counts.sum().double()
    weight_of_token = (2 / (1 + torch.exp((data * gap).sum() - gap))).clamp(0.5, 1.5)
    want = scaled_kl_gradient(student, data, weight_of_token)
    torch.testing.assert_close(gradient_of(logits).double(), want, rtol=0, atol=1e-6)
