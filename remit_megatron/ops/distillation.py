"""Forward KL to a reference's distribution over a sharded vocabulary, with the NLL beside it.

The reference's logits are formed chunk by chunk from its hidden states, once in forward and once more in backward, and
no rank ever holds another's columns: five numbers a token and rank cross tensor parallelism, more for a top k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.distillation_topk import TopK
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
    assert teacher.top_k >= 0, f"top_k must not be negative, got {teacher.top_k}"
    shard = Shard.of(logits.shape[-1], valid_vocab, tp_group)
    comparison = TopK(teacher.top_k, shard) if teacher.top_k else Whole(shard)
    result: Tensor = _NLLAndKL.apply(logits, labels, teacher, comparison, is_overwritable(logits))
    return result


class Comparison(Protocol):
    """How two models' distributions are compared, for one call of `nll_and_kl`. Called chunk by chunk, in order.

    x, r: [n, columns] float32 logits of student and reference over the temperature, this rank's valid columns.
    """

    shard: Shard

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[k, n] float32, what `combine` needs of a chunk of tokens."""

    def combine(self, stats: Tensor) -> Tensor:
        """Statistics of all tokens [k, N] -> their KL [N] over the whole vocabulary. Collective."""

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """After `combine`: the KL's gradient in x [n, columns], for a chunk and its number. Overwrites x and r."""


class Whole:
    """Over every token of the vocabulary."""

    def __init__(self, shard: Shard):
        self.shard = shard

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[3, n]: both log-sum-exps (-inf where there are no columns), and the mean of r - x under softmax(r)."""
        n, columns = x.shape
        if columns == 0:
            return torch.tensor([-torch.inf, -torch.inf, 0.0], device=x.device)[:, None].expand(3, n)
        student_lse, reference_lse = x.logsumexp(dim=1), r.logsumexp(dim=1)
        q = (r - reference_lse[:, None]).exp_()
        return torch.stack([student_lse, reference_lse, q.mul_(r.sub(x)).sum(dim=1)])

    def combine(self, stats: Tensor) -> Tensor:
        """sum_r share_r gap_r - (reference_lse - student_lse), with share_r the reference's probability of rank r's
        columns; exactly 0 where the two models' logits are equal."""
        ranks = self.shard.of_all_ranks(stats)
        self.student_lse, self.reference_lse = ranks[:, 0].logsumexp(dim=0), ranks[:, 1].logsumexp(dim=0)
        gap = ((ranks[:, 1] - self.reference_lse).exp() * ranks[:, 2]).sum(dim=0)
        return gap - (self.reference_lse - self.student_lse)

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        q = r.sub_(self.reference_lse[chunk, None]).exp_()
        return x.sub_(self.student_lse[chunk, None]).exp_().sub_(q)


class _NLLAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Teacher, comparison: Comparison, may_overwrite: bool
    ) -> Tensor:
        shard = comparison.shard
        lse, nll = combine_stats(torch_local_stats(logits, labels, shard), labels, shard)
        stats = [comparison.local_stats(x, r) for _, x, r in _chunks(logits, teacher, shard)]
        kl = comparison.combine(torch.cat(stats, dim=1)).view(labels.shape).masked_fill(labels == -100, 0.0)
        ctx.save_for_backward(logits, labels, lse)
        ctx.teacher, ctx.comparison, ctx.may_overwrite = teacher, comparison, may_overwrite
        return torch.stack([nll, kl])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        teacher, comparison, logits = ctx.teacher, ctx.comparison, logits.detach()
        shard = comparison.shard
        out = logits if ctx.may_overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        nll_factor = gradient_coefficient(upstream[0], labels, shard).flatten()
        kl_factor = upstream[1].float().masked_fill(labels == -100, 0.0).flatten() / teacher.temperature
        flat, flat_out, flat_labels = logits.flatten(0, 1), out.flatten(0, 1), labels.flatten()
        for number, (chunk, x, r) in enumerate(_chunks(logits, teacher, shard)):
            factor = kl_factor[chunk, None]
            # Filled, not multiplied by 0: the logits of a masked token may be anything.
            of_kl = comparison.difference(number, chunk, x, r).mul_(factor).masked_fill_(factor == 0, 0.0)
            both = torch.empty(flat[chunk].shape, dtype=torch.float32, device=logits.device)
            torch_write_gradient(flat[chunk], flat_labels[chunk], lse.flatten()[chunk], nll_factor[chunk], shard, both)
            both[:, : shard.num_valid] += of_kl
            flat_out[chunk] = both
        return out, None, None, None, None


def _chunks(logits: Tensor, teacher: Teacher, shard: Shard) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, student's and reference's valid logits over the temperature), the logits copies in float32."""
    flat, hidden = logits.detach().flatten(0, 1), teacher.hidden.flatten(0, 1)
    for start in range(0, len(flat), teacher.chunk_tokens):
        chunk = slice(start, min(start + teacher.chunk_tokens, len(flat)))
        reference = (hidden[chunk] @ teacher.weight.t())[:, : shard.num_valid]
        student, scale = flat[chunk, : shard.num_valid].to(torch.float32, copy=True), teacher.temperature
        yield chunk, student.div_(scale), reference.to(torch.float32, copy=True).div_(scale)
