"""The student's linear head and weighted loss, one sequence at a time: [s, b, V] logits never exist."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.implementation import Implementation
from remit_megatron.ops.shard import Shard, combine_stats, gradient_coefficient
from remit_megatron.ops.token_nll import Kernels, select_kernels

SequenceLoss = Callable[[int, Tensor], Tensor]
"""(sample i, its NLL [1, s] float32 as a leaf with gradient) -> that sample's loss sum, a scalar."""


def linear_loss_by_sequence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_of_sequence: SequenceLoss,
    *,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum over samples of `loss_of_sequence(i, token_nll(hidden[:, i] @ weight.T, labels[i]))`, without whole logits.

    Token weights need a sample's NLL only, so a sample's logits can turn into their gradient, and that into the
    gradients of `hidden` and `weight`, before the next sample's are formed: no logits are kept and none recomputed.

    Args:
        hidden: [s, b, h] inputs of the head, whole (not sharded over tensor or sequence parallelism).
        weight: [L, h] this rank's rows of the head, of the dtype of `hidden`.
        labels: [b, s] int64, -100 for a token to ignore.
        loss_of_sequence: called in forward once a sample, in order, on every rank; differentiable in the NLL. It may
            run collectives over context parallelism: each is then one a sample.
        valid_vocab, tp_group, implementation: as in `token_nll`.

    Returns:
        The loss sum, float32, differentiable in `hidden` and `weight`, and the NLL [b, s] float32 without gradient.
        The gradient of `hidden` is this rank's part, to be summed over `tp_group` as for any column-parallel linear.
        The gradient of `weight` is summed over samples in the weight's dtype, rounded once a sample.

    Collectives: one all-gather of [2, s] float32 a sample where tp_group has several ranks.
    Memory: one sample's logits [s, L] and the two gradients, which are held until backward.
    """
    assert hidden.dim() == 3, f"hidden must be [s, b, h], got {hidden.shape}"
    assert weight.dim() == 2, f"weight must be [L, h], got {weight.shape}"
    assert weight.shape[1] == hidden.shape[2], f"weight {weight.shape} does not fit hidden {hidden.shape}"
    assert labels.shape == (hidden.shape[1], hidden.shape[0]), f"labels {labels.shape} must be [b, s]"
    shard = Shard.of(weight.shape[0], valid_vocab, tp_group)
    kernels = select_kernels(implementation, hidden.device.type)
    loss_sum, nll = _LinearLoss.apply(hidden, weight, labels, loss_of_sequence, shard, kernels)
    return loss_sum, nll


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_of_sequence: SequenceLoss,
        shard: Shard,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        hidden, weight = hidden.detach(), weight.detach()
        needs_gradient = any(ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient = torch.zeros_like(weight) if needs_gradient else None
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        nll = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for i in range(hidden.shape[1]):
            x, y = hidden[:, i], labels[i]
            torch.mm(x, weight.t(), out=logits)
            lse, nll[i] = combine_stats(kernels.local_stats(logits, y, shard), y, shard)
            loss, upstream = _loss_and_gradient(loss_of_sequence, i, nll[i : i + 1])
            loss_sum += loss
            if hidden_gradient is None or weight_gradient is None:
                continue
            kernels.write_gradient(logits, y, lse, gradient_coefficient(upstream[0], y, shard), shard, logits)
            hidden_gradient[:, i] = logits @ weight
            weight_gradient.addmm_(logits.t(), x)
        ctx.mark_non_differentiable(nll)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss_sum, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return _scaled(hidden_gradient, upstream), _scaled(weight_gradient, upstream), None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, rounded once: as a tensor of no dimensions the factor itself would be rounded to 16 bits."""
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient))


def _loss_and_gradient(loss_of_sequence: SequenceLoss, i: int, nll: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = nll.detach().clone().requires_grad_()
        loss = loss_of_sequence(i, leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
