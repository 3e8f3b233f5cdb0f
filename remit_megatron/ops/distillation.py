"""A reference's distribution compared with a student's over a sharded vocabulary, with the NLL beside it.

The reference's logits are formed chunk by chunk from its hidden states, once in forward and once more in backward, and
no rank ever holds another's columns: five numbers a token and rank cross tensor parallelism, more for a top k. Tokens
whose comparison nobody wants cost nothing of this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.choices import Compared
from remit_megatron.ops.distillation_top1 import MostProbable
from remit_megatron.ops.distillation_topk import ReverseTopK, TopK
from remit_megatron.ops.shard import Shard, check_labels, combine_stats, gradient_coefficient
from remit_megatron.ops.token_nll import is_overwritable, torch_local_stats, torch_write_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The frozen reference's distribution of one microbatch, as the inputs of its head."""

    hidden: Tensor
    """[s, b, h] inputs of the head, whole (not sharded over tensor or sequence parallelism)."""
    weight: Tensor
    """[L, h] this rank's rows of the head: the same columns of the vocabulary as the student's."""
    valid_vocab: int | None = None
    """Columns of all ranks, from the first on, that both models have: the two are compared over them alone. None: the
    student's."""
    temperature: float = 1.0
    """Both models' logits are divided by it, for the KL only; not read by the comparison "top1"."""
    chunk_tokens: int = 1024
    """Tokens whose reference logits exist at one time."""
    top_k: int = 0
    """Above 0: the KL is over so many tokens, the reference's most probable, and one bucket for the rest."""
    compare: Compared = "forward"
    """KL(reference || student), KL(student || reference), or the student's NLL of the reference's most probable
    token."""


def nll_and_kl(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    *,
    compared: Tensor | None = None,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(-log p(label), the comparison of reference and student) of each token, in nats.

    Args:
        logits: [s, b, L] this rank's columns of the student's logits, contiguous.
        labels: [s, b] int64, or -100 for a token to ignore.
        teacher: the reference's distribution of the same tokens, and how it is compared.
        compared: [s, b] bool, the tokens whose comparison is wanted, the same on all ranks of tp_group; the others'
            is 0 and has no gradient. None: all. Waits for the device, to learn how many there are.
        valid_vocab, tp_group: as in `token_nll`. Padding columns are in neither softmax. Where the reference has fewer
            rows than the student, or the student fewer, `teacher.valid_vocab` says how many both have: in the
            comparison both softmaxes are over these, in the NLL the student's is over its own.

    Returns:
        [2, s, b] float32, differentiable in `logits`: the NLL, with the bits of `token_nll` in torch, and with q, p the
        softmax of reference and student at the temperature, sum_v q_v (log q_v - log p_v) in the forward direction, its
        gradient (p - q) / temperature; or sum_v p_v (log p_v - log q_v) in the reverse direction, its gradient
        p (log p - log q - KL) / temperature. Ignored tokens give 0 and a zero gradient row.

    Collectives: one all-gather of [2, n] and one of [3, n] float32 where tp_group has several ranks; none in backward.
    With `teacher.top_k` one of [5, n] in place of the latter, and one of [chunk, k] for each chunk of tokens. n counts
    the tokens compared, but for the first.
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
    common = shard if teacher.valid_vocab is None else Shard.of(logits.shape[-1], teacher.valid_vocab, tp_group)
    assert common.valid_vocab <= shard.valid_vocab, f"{common.valid_vocab} columns of {shard.valid_vocab} are common"
    parts = _parts(labels.numel(), compared, teacher.chunk_tokens)
    comparison = _comparison(teacher, common)
    result: Tensor = _NLLAndKL.apply(logits, labels, teacher, comparison, parts, shard, is_overwritable(logits))
    return result


class Comparison(Protocol):
    """How two models' distributions are compared, for one call of `nll_and_kl`. Called chunk by chunk, in order; not at
    all where no token is compared.

    x, r: [n, columns] float32 logits of student and reference over the temperature, this rank's valid columns.
    """

    shard: Shard
    """Its valid columns are those compared."""

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[k, n] float32, what `combine` needs of a chunk of tokens."""

    def combine(self, stats: Tensor) -> Tensor:
        """Statistics of all tokens compared [k, N] -> their comparison [N] over the whole vocabulary. Collective."""

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """After `combine`: its gradient in x [n, columns], for a chunk of the tokens compared and its number.
        Overwrites x and r."""


class Whole:
    """Forward KL over every token of the vocabulary."""

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


class Reverse(Whole):
    """Reverse KL over every token of the vocabulary: the forward one with the models' roles exchanged."""

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[3, n]: the log-sum-exps of reference and student, and the mean of x - r under softmax(x)."""
        return super().local_stats(r, x)

    def combine(self, stats: Tensor) -> Tensor:
        """The same, for what is exchanged."""
        kl = super().combine(stats)
        self.student_lse, self.reference_lse = self.reference_lse, self.student_lse
        self.mean_gap = kl + (self.student_lse - self.reference_lse)
        return kl

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """p times how far x - r is above its mean under p."""
        above = r.neg_().add_(x).sub_(self.mean_gap[chunk, None])
        return x.sub_(self.student_lse[chunk, None]).exp_().mul_(above)


def _comparison(teacher: Teacher, shard: Shard) -> Comparison:
    assert teacher.compare != "top1" or not teacher.top_k, "top_k is for a KL"
    if teacher.compare == "top1":
        return MostProbable(shard)
    if teacher.top_k:
        return (ReverseTopK if teacher.compare == "reverse" else TopK)(teacher.top_k, shard)
    return Reverse(shard) if teacher.compare == "reverse" else Whole(shard)


class _Part(NamedTuple):
    """A chunk of the tokens compared."""

    place: slice
    """Among the tokens compared."""
    tokens: slice | Tensor
    """Among all tokens, flattened: a range, or [n] int64 indices."""


class _Parts(NamedTuple):
    """All tokens, in chunks whose reference logits exist at one time."""

    compared: list[_Part]
    others: list[Tensor]
    """[n] int64 each."""


def _parts(num_tokens: int, compared: Tensor | None, chunk_tokens: int) -> _Parts:
    if compared is None:
        starts = range(0, num_tokens, chunk_tokens)
        ranges = [slice(start, min(start + chunk_tokens, num_tokens)) for start in starts]
        return _Parts([_Part(one, one) for one in ranges], [])
    wanted = compared.flatten()
    chunks = [one for one in wanted.nonzero()[:, 0].split(chunk_tokens) if len(one)]
    others = [one for one in (~wanted).nonzero()[:, 0].split(chunk_tokens) if len(one)]
    places = [slice(i * chunk_tokens, i * chunk_tokens + len(one)) for i, one in enumerate(chunks)]
    return _Parts([_Part(*both) for both in zip(places, chunks, strict=True)], others)


class _NLLAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        teacher: Teacher,
        comparison: Comparison,
        parts: _Parts,
        shard: Shard,
        may_overwrite: bool,
    ) -> Tensor:
        lse, nll = combine_stats(torch_local_stats(logits, labels, shard), labels, shard)
        kl = torch.zeros(labels.numel(), dtype=torch.float32, device=logits.device)
        stats = [comparison.local_stats(x, r) for _, x, r in _chunks(logits, teacher, parts, comparison.shard)]
        if stats:
            found = comparison.combine(torch.cat(stats, dim=1))
            for part in parts.compared:
                kl[part.tokens] = found[part.place]
        ctx.save_for_backward(logits, labels, lse)
        ctx.teacher, ctx.comparison, ctx.parts, ctx.may_overwrite = teacher, comparison, parts, may_overwrite
        ctx.shard = shard
        return torch.stack([nll, kl.view(labels.shape).masked_fill(labels == -100, 0.0)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        teacher, comparison, parts, logits = ctx.teacher, ctx.comparison, ctx.parts, logits.detach()
        shard, common = ctx.shard, comparison.shard
        out = logits if ctx.may_overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        nll_factor = gradient_coefficient(upstream[0], labels, shard).flatten()
        kl_factor = upstream[1].float().masked_fill(labels == -100, 0.0).flatten() / _divisor(teacher)
        flat, flat_out, flat_labels, flat_lse = logits.flatten(0, 1), out.flatten(0, 1), labels.flatten(), lse.flatten()
        for number, (part, x, r) in enumerate(_chunks(logits, teacher, parts, common)):
            tokens, factor = part.tokens, kl_factor[part.tokens, None]
            # Filled, not multiplied by 0: the logits of a masked token may be anything.
            of_kl = comparison.difference(number, part.place, x, r).mul_(factor).masked_fill_(factor == 0, 0.0)
            both = torch.empty(of_kl.shape[0], flat.shape[1], dtype=torch.float32, device=logits.device)
            torch_write_gradient(flat[tokens], flat_labels[tokens], flat_lse[tokens], nll_factor[tokens], shard, both)
            both[:, : common.num_valid] += of_kl
            flat_out[tokens] = both.to(out.dtype)
        for tokens in parts.others:
            rows = flat[tokens]
            torch_write_gradient(rows, flat_labels[tokens], flat_lse[tokens], nll_factor[tokens], shard, rows)
            flat_out[tokens] = rows
        return out, None, None, None, None, None, None


def _chunks(logits: Tensor, teacher: Teacher, parts: _Parts, shard: Shard) -> Iterator[tuple[_Part, Tensor, Tensor]]:
    """(tokens compared, student's and reference's logits over the temperature, of the columns that are compared), the
    logits copies in float32."""
    flat, hidden, divisor = logits.detach().flatten(0, 1), teacher.hidden.flatten(0, 1), _divisor(teacher)
    for part in parts.compared:
        reference = (hidden[part.tokens] @ teacher.weight.t())[:, : shard.num_valid]
        student = flat[part.tokens, : shard.num_valid].to(torch.float32, copy=True)
        yield part, student.div_(divisor), reference.to(torch.float32, copy=True).div_(divisor)


def _divisor(teacher: Teacher) -> float:
    return 1.0 if teacher.compare == "top1" else teacher.temperature
