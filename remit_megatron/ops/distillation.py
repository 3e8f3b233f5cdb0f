"""Forward KL to a reference's distribution over a sharded vocabulary, with the NLL beside it.

The reference's logits are formed chunk by chunk from its hidden states, once in forward and once more in backward, and
no rank ever holds another's columns: five numbers a token and rank cross tensor parallelism.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.shard import Shard, check_labels, combine_stats, gradient_coefficient
from remit_megatron.ops.token_nll import is_overwritable, torch_local_stats, torch_write_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The frozen reference's distribution of one microbatch, as the inputs of its head."""

    hidden: Tensor
    """[s, b, h] inputs of the head, whole (not sharded over tensor or sequence parallelism)."""
    weight: Tensor
    """[L, h] this rank's rows of the head: the same columns of the vocabulary as the student's."""
    temperature: float = 1.0
    """Both models' logits are divided by it, for the KL only."""
    chunk_tokens: int = 1024
    """Tokens whose reference logits exist at one time."""
    top_k: int = 0
    """Above 0: the KL is over so many tokens, the reference's most probable, and one bucket for the rest."""


def nll_and_kl(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    *,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(-log p(label), KL(reference || student)) of each token, in nats.

    Args:
        logits: [s, b, L] this rank's columns of the student's logits, contiguous.
        labels: [s, b] int64, or -100 for a token to ignore.
        teacher: the reference's distribution of the same tokens.
        valid_vocab, tp_group: as in `token_nll`. Padding columns are in neither softmax.

    Returns:
        [2, s, b] float32, differentiable in `logits`: the NLL, with the bits of `token_nll` in torch, and
        sum_v q_v (log q_v - log p_v) with q, p the softmax of reference and student at the temperature. Its gradient
        is (p - q) / temperature. Ignored tokens give 0 and a zero gradient row.

    Collectives: one all-gather of [2, n] and one of [3, n] float32 where tp_group has several ranks; none in backward.
    With `teacher.top_k` one of [5, n] in place of the latter, and one of [chunk, k] for each chunk of tokens.
    Backward overwrites logits that are an intermediate result, as in `token_nll`.
    """
    check_labels(logits, labels)
    assert logits.dim() == 3, f"logits must be [s, b, L], got {logits.shape}"
    assert teacher.hidden.shape[:2] == labels.shape, (
        f"hidden {teacher.hidden.shape} must be of the tokens of logits {logits.shape}"
    )
    assert teacher.weight.shape[0] == logits.shape[-1], (
        f"the reference's head {teacher.weight.shape} must have the student's {logits.shape[-1]} columns"
    )
    assert teacher.temperature > 0, f"temperature must be positive, got {teacher.temperature}"
    shard = Shard.of(logits.shape[-1], valid_vocab, tp_group)
    assert teacher.top_k >= 0, f"top_k must not be negative, got {teacher.top_k}"
    if teacher.top_k:
        from remit_megatron.ops.distillation_topk import NLLAndTopKL

        both: Tensor = NLLAndTopKL.apply(logits, labels, teacher, shard, is_overwritable(logits))
        return both
    result: Tensor = _NLLAndKL.apply(logits, labels, teacher, shard, is_overwritable(logits))
    return result


class _NLLAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Teacher, shard: Shard, may_overwrite: bool
    ) -> Tensor:
        lse, nll = combine_stats(torch_local_stats(logits, labels, shard), labels, shard)
        stats = torch.empty(3, labels.numel(), dtype=torch.float32, device=logits.device)
        for chunk, x, r in chunks_of(logits, teacher, shard):
            stats[:, chunk] = _local_stats(x, r)
        student_lse, reference_lse, kl = _combine(stats, shard)
        kl = kl.view(labels.shape).masked_fill(labels == -100, 0.0)
        ctx.save_for_backward(logits, labels, lse, student_lse, reference_lse)
        ctx.teacher, ctx.shard, ctx.may_overwrite = teacher, shard, may_overwrite
        return torch.stack([nll, kl])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse, student_lse, reference_lse = ctx.saved_tensors

        def difference(number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
            return x.sub_(student_lse[chunk, None]).exp_().sub_(r.sub_(reference_lse[chunk, None]).exp_())

        out = write_both_gradients(
            logits, labels, lse, upstream, ctx.teacher, ctx.shard, difference, may_overwrite=ctx.may_overwrite
        )
        return out, None, None, None, None


def write_both_gradients(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    upstream: Tensor,
    teacher: Teacher,
    shard: Shard,
    difference: Callable[[int, slice, Tensor, Tensor], Tensor],
    *,
    may_overwrite: bool,
) -> Tensor:
    """[s, b, L], the gradient of NLL and KL, chunk by chunk. upstream: [2, s, b].

    difference: number of the chunk, its tokens, student's and reference's logits over the temperature [n, columns],
    both to be overwritten -> the KL's gradient in the former.
    """
    logits = logits.detach()
    out = logits if may_overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
    nll_factor = gradient_coefficient(upstream[0], labels, shard).flatten()
    kl_factor = upstream[1].float().masked_fill(labels == -100, 0.0).flatten() / teacher.temperature
    flat, flat_out, flat_labels = logits.flatten(0, 1), out.flatten(0, 1), labels.flatten()
    for number, (chunk, x, r) in enumerate(chunks_of(logits, teacher, shard)):
        factor = kl_factor[chunk, None]
        # Filled, not multiplied by 0: the logits of a masked token may be anything.
        of_kl = difference(number, chunk, x, r).mul_(factor).masked_fill_(factor == 0, 0.0)
        both = torch.empty(flat[chunk].shape, dtype=torch.float32, device=logits.device)
        torch_write_gradient(flat[chunk], flat_labels[chunk], lse.flatten()[chunk], nll_factor[chunk], shard, both)
        both[:, : shard.num_valid] += of_kl
        flat_out[chunk] = both
    return out


def chunks_of(logits: Tensor, teacher: Teacher, shard: Shard) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, student's and reference's valid logits over the temperature), the logits copies in float32."""
    flat, hidden = logits.detach().flatten(0, 1), teacher.hidden.flatten(0, 1)
    for start in range(0, len(flat), teacher.chunk_tokens):
        chunk = slice(start, min(start + teacher.chunk_tokens, len(flat)))
        reference = (hidden[chunk] @ teacher.weight.t())[:, : shard.num_valid]
        student, scale = flat[chunk, : shard.num_valid].to(torch.float32, copy=True), teacher.temperature
        yield chunk, student.div_(scale), reference.to(torch.float32, copy=True).div_(scale)


def _local_stats(student: Tensor, reference: Tensor) -> Tensor:
    """[3, n] float32 from the local columns [n, columns]: both log-sum-exps (-inf where there are no columns), and the
    mean of reference - student under the local softmax of the reference."""
    n, columns = student.shape
    if columns == 0:
        return torch.tensor([-torch.inf, -torch.inf, 0.0], device=student.device)[:, None].expand(3, n)
    student_lse, reference_lse = student.logsumexp(dim=1), reference.logsumexp(dim=1)
    q = (reference - reference_lse[:, None]).exp_()
    return torch.stack([student_lse, reference_lse, q.mul_(reference.sub(student)).sum(dim=1)])


def _combine(stats: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Local statistics -> (student's log-sum-exp, the reference's, KL) over the whole vocabulary, each [n] float32.

    KL = sum_r share_r gap_r - (reference_lse - student_lse), with share_r the reference's probability of rank r's
    columns; exactly 0 where the two models' logits are equal.
    """
    ranks = stats[None]
    if shard.tp_group is not None and dist.get_world_size(shard.tp_group) > 1:
        size = dist.get_world_size(shard.tp_group)
        flat = torch.empty(size * stats.numel(), dtype=stats.dtype, device=stats.device)
        dist.all_gather_into_tensor(flat, stats.flatten(), group=shard.tp_group)
        ranks = flat.view(size, *stats.shape)
    student_lse, reference_lse = ranks[:, 0].logsumexp(dim=0), ranks[:, 1].logsumexp(dim=0)
    gap = ((ranks[:, 1] - reference_lse).exp() * ranks[:, 2]).sum(dim=0)
    return student_lse, reference_lse, gap - (reference_lse - student_lse)
