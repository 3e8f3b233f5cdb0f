"""Cases and error bounds that the tests of every NLL implementation share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from remit_megatron.ops import spec

EPS_FLOAT32 = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "slice of wider rows": lambda x: torch.nn.functional.pad(x, (3, 4), value=1e4)[..., 3 : 3 + x.shape[-1]],
    "every other column": lambda x: torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}
"""Functions that leave the values of logits [s, b, V] alone and change their strides."""


def gradient_of(leaf: Tensor) -> Tensor:
    """What backward left in the leaf."""
    assert leaf.grad is not None
    return leaf.grad


@dataclass(frozen=True)
class Case:
    """Whole logits [s, b, V] on CPU with what a test needs beside them."""

    logits: Tensor
    labels: Tensor
    """[s, b], some of them -100."""
    upstream: Tensor
    """[s, b] float32, some of them 0."""
    valid_vocab: int

    def spec(self) -> tuple[Tensor, Tensor]:
        """Float64 NLL [s, b] and gradient [s, b, V] from autograd."""
        logits = self.logits.double().requires_grad_()
        nll = spec.token_nll(logits, self.labels, valid_vocab=self.valid_vocab)
        nll.backward(self.upstream.double())
        return nll.detach(), gradient_of(logits)


def make_case(
    seed: int,
    *,
    s: int,
    b: int,
    vocab: int,
    valid_vocab: int | None = None,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float32,
    edge: int | None = None,
) -> Case:
    """Random case; padding columns hold 1e4, so that counting one shows. `edge`: shard width; labels at its borders."""
    generator = torch.Generator().manual_seed(seed)
    valid_vocab = vocab if valid_vocab is None else valid_vocab
    logits = (torch.randn(s, b, vocab, generator=generator) * scale + 1.0).to(dtype)
    logits[..., valid_vocab:] = 1e4
    labels = torch.randint(0, valid_vocab, (s, b), generator=generator)
    if edge is not None:
        borders = [c for i in range(0, vocab + 1, edge) for c in (i - 1, i) if 0 <= c < valid_vocab]
        labels.view(-1)[: len(borders)] = torch.tensor(borders)[: labels.numel()]
    labels[torch.rand(s, b, generator=generator) < 0.2] = spec.IGNORED_LABEL
    upstream = torch.rand(s, b, generator=generator) * 4 - 1
    upstream[torch.rand(s, b, generator=generator) < 0.2] = 0.0
    return Case(logits, labels, upstream, valid_vocab)


def check_nll(nll: Tensor, want: Tensor, case: Case) -> None:
    """Float32 NLL against float64. Log-sum-exp and target are each rounded to float32 at the logits' magnitude."""
    assert nll.dtype == torch.float32
    largest = case.logits[..., : case.valid_vocab].abs().max().item()
    assert (nll.double() - want).abs().max().item() <= 4 * EPS_FLOAT32 * (10.0 + largest)
    assert not nll[case.labels == spec.IGNORED_LABEL].any()


def check_gradient(gradient: Tensor, want: Tensor, case: Case, rounding: float = 0.501) -> None:
    """Gradient in the logits' dtype against float64: float32 arithmetic and one rounding to the dtype.

    exp(x - lse) has the relative error of lse's rounding, at the logits' magnitude; the rounding adds half a unit in
    the last place of the dtype (`rounding` units), and a smallest step for float16's subnormal numbers.
    """
    assert gradient.dtype == case.logits.dtype
    largest = case.logits[..., : case.valid_vocab].abs().max().item()
    info = torch.finfo(gradient.dtype)
    allowed = 4 * EPS_FLOAT32 * (10.0 + largest) * case.upstream.abs().double()[..., None]
    allowed = allowed + rounding * info.eps * want.abs() + info.smallest_normal * info.eps
    excess = (gradient.double() - want).abs() - allowed
    assert excess.max().item() <= 0, f"gradient exceeds its bound by {excess.max().item():.2e}"
    unused = (case.labels == spec.IGNORED_LABEL) | (case.upstream == 0)
    assert not gradient[unused].any()
    assert not gradient[..., case.valid_vocab :].any()


def check_no_worse_than_torch(nll: Tensor, gradient: Tensor, case: Case) -> None:
    """Largest and mean error against float64, of NLL and gradient, are at most those of F.cross_entropy in the logits'
    dtype, plus an epsilon: 4 float32 roundings at the logits' magnitude, for the gradient times the upstream one."""
    logits = case.logits[..., : case.valid_vocab].clone().requires_grad_()
    labels, (want_nll, want_gradient) = case.labels.flatten(), case.spec()
    theirs = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view_as(case.labels)
    theirs.backward(case.upstream.to(theirs.dtype))
    epsilon = 4 * EPS_FLOAT32 * (10.0 + logits.detach().abs().max().item())
    largest_upstream = case.upstream.abs().max().item()
    for ours, other, want, allowed in (
        (nll, theirs.detach(), want_nll, epsilon),
        (gradient[..., : case.valid_vocab], gradient_of(logits), want_gradient[..., : case.valid_vocab],
         epsilon * largest_upstream),
    ):  # fmt: skip
        error, torchs = ((x.double() - want).abs() for x in (ours, other))
        assert error.max() <= torchs.max() + allowed
        assert error.mean() <= torchs.mean() + allowed
