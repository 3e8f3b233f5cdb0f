"""A reference's distribution of which K tokens and the mass of all others are known, compared with a student's over a
sharded vocabulary, with the NLL beside it.

All but K columns of a token have a gradient of one form, a number times the student's probability: so the comparison
reads the logits once forward and once backward, and four numbers a token and rank cross tensor parallelism.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.choices import Compared
from remit_megatron.ops.shard import Shard, check_labels, combine_stats, gradient_coefficient
from remit_megatron.ops.token_nll import (
    MAX_PIECE_ELEMENTS,
    MIN_PIECE_ELEMENTS,
    is_overwritable,
    torch_local_stats,
    torch_write_gradient,
)
from remit_megatron.ops.top_tokens import TopTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTeacher:
    """What is known of the frozen reference's distributions of one microbatch."""

    top: TopTokens
    """[s, b, K] and [s, b], the same on all tensor-parallel ranks; at `temperature`."""
    temperature: float = 1.0
    """The student's logits are divided by it, for the KL only; not read by the comparison "top1"."""
    compare: Compared = "forward"
    """KL(reference || student), KL(student || reference), or the student's NLL of the reference's most probable
    token."""


def nll_and_kept_kl(
    logits: Tensor,
    labels: Tensor,
    teacher: KeptTeacher,
    *,
    compared: Tensor | None = None,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(-log p(label), the comparison of reference and student) of each token, in nats.

    Args: as of `nll_and_kl`, but that K tokens and one bucket for all others are compared: the student's mass of those
    with the reference's. It is a lower bound of the KL over the vocabulary in either direction, and equal to it where K
    covers that. The reference's probabilities are normalised to 1, from which rounding takes them.

    Returns:
        [2, s, b] float32, differentiable in `logits`: the NLL, with the bits of `token_nll` in torch, and the
        comparison. Ignored tokens give 0 and a zero gradient row.

    Collectives: an all-gather of [2, n] and one of [4, n] float32 where tp_group has several ranks; none in backward.
    n counts the tokens compared in the latter. Backward overwrites logits that are an intermediate result, as in
    `token_nll`.
    """
    check_labels(logits, labels)
    assert logits.dim() == 3, f"logits must be [s, b, L], got {logits.shape}"
    assert teacher.top.ids.shape[:2] == labels.shape, (
        f"ids {teacher.top.ids.shape} must be of the tokens of logits {logits.shape}"
    )
    assert teacher.temperature > 0, f"temperature must be positive, got {teacher.temperature}"
    shard = Shard.of(logits.shape[-1], valid_vocab, tp_group)
    wanted = None if compared is None else compared.flatten()
    result: Tensor = _NLLAndKeptKL.apply(logits, labels, teacher, shard, wanted, is_overwritable(logits))
    return result


class _Known(NamedTuple):
    """The reference's side of N tokens compared, normalised."""

    ids: Tensor
    """[N, K] int64."""
    log_q: Tensor
    """[N, K] float32."""
    log_tail: Tensor
    """[N] float32."""


class _Slopes(NamedTuple):
    """The comparison's gradient in N tokens' logits over the temperature, in few numbers."""

    of_top: Tensor
    """[N, K] float32, at the K columns; anything finite where another rank has the column."""
    sign: Tensor
    """[N] float32. At every other column the gradient is sign exp(logit - shift)."""
    shift: Tensor
    """[N] float32."""


def _known(top: TopTokens, tokens: Tensor | None) -> _Known:
    ids, log_q, log_tail = top.ids.flatten(0, 1), top.log_probs.flatten(0, 1), top.log_tail.flatten()
    if tokens is not None:
        ids, log_q, log_tail = ids[tokens], log_q[tokens], log_tail[tokens]
    total = torch.logaddexp(log_q.logsumexp(dim=1), log_tail)
    return _Known(ids.long(), log_q - total[:, None], log_tail - total)


def _columns(ids: Tensor, shard: Shard) -> Tensor:
    """[n, K] int64: this rank's columns; `num_valid`, one past the last, for ids that it does not have."""
    local = ids - shard.first
    return local.where((local >= 0) & (local < shard.num_valid), shard.num_valid)


def _local_stats(compare: Compared, found: Tensor, lse_others: Tensor, log_q: Tensor) -> Tensor:
    """[4, n] of this rank's columns: their log-sum-exp, that of those outside the K, and of those among the K a sum of
    terms that count from the former, and of their weights.

    found: [n, K] logits, -inf where another rank has the column.
    """
    here = found > -torch.inf
    lse = torch.logaddexp(found.logsumexp(dim=1), lse_others)
    log_p = (found - lse[:, None]).masked_fill(~here, 0.0)
    if compare == "forward":
        weight, term = log_q.exp(), log_q - log_p
    elif compare == "reverse":
        weight, term = log_p.exp(), log_p - log_q
    else:
        weight, term = torch.zeros_like(log_p), log_p
        weight[:, 0] = 1.0
    weight = weight.masked_fill(~here, 0.0)
    return torch.stack([lse, lse_others, (weight * term.masked_fill(~here, 0.0)).sum(dim=1), weight.sum(dim=1)])


def _combine(compare: Compared, ranks: Tensor, found: Tensor, known: _Known) -> tuple[Tensor, _Slopes]:
    """(comparison [N] over the whole vocabulary, its gradient), from statistics [ranks, 4, N]."""
    lse, lse_others = ranks[:, 0].logsumexp(dim=0), ranks[:, 1].logsumexp(dim=0)
    above = (ranks[:, 0] - lse).masked_fill(ranks[:, 3] == 0, 0.0)  # a rank without columns has -inf
    here = found > -torch.inf
    log_p = (found - lse[:, None]).masked_fill(~here, 0.0)
    log_tail, q_tail = lse_others - lse, known.log_tail  # -inf both where K covers the vocabulary
    if compare == "forward":
        surplus = (q_tail - log_tail).where(q_tail > -torch.inf, 0.0)
        value = (ranks[:, 2] - ranks[:, 3] * above).sum(dim=0) + q_tail.exp() * surplus
        of_top = log_p.exp() - known.log_q.exp()
        # In float64, and as a logarithm below: the ratio of the tails may be beyond float32.
        of_others = 1.0 - (q_tail - log_tail).double().nan_to_num(nan=0.0, neginf=-torch.inf).exp()
    elif compare == "reverse":
        ratio = (log_tail - q_tail).where(log_tail > -torch.inf, 0.0)
        value = (above.exp() * (ranks[:, 2] + ranks[:, 3] * above)).sum(dim=0) + log_tail.exp() * ratio
        of_top = log_p.exp() * (log_p - known.log_q - value[:, None])
        of_others = (ratio - value).double()
    else:
        value = -(ranks[:, 2] + ranks[:, 3] * above).sum(dim=0)
        of_top = log_p.exp()
        of_top[:, 0] -= 1.0
        of_others = torch.ones_like(value, dtype=torch.float64)
    shift = (lse.double() - of_others.abs().log()).float()
    return value, _Slopes(of_top.masked_fill(~here, 0.0), of_others.sign().float(), shift)


class _Part(NamedTuple):
    """A chunk of tokens."""

    place: slice
    """Among the tokens compared."""
    tokens: slice | Tensor
    """Among all tokens, flattened."""


def _parts(tokens: Tensor | None, num_tokens: int, num_columns: int) -> list[_Part]:
    """Chunks whose float32 copy is small beside the logits, as those of `token_nll`."""
    limit = min(max(num_tokens * num_columns // 512, MIN_PIECE_ELEMENTS), MAX_PIECE_ELEMENTS)
    size, count = max(1, limit // max(num_columns, 1)), num_tokens if tokens is None else len(tokens)
    places = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [_Part(place, place if tokens is None else tokens[place]) for place in places]


def _copied(flat: Tensor, part: _Part, shard: Shard, divisor: float) -> Tensor:
    """[n, num_valid + 1] float32 logits of a chunk over the temperature, and -inf in the last column."""
    rows = flat[part.tokens, : shard.num_valid]
    work = torch.empty(len(rows), shard.num_valid + 1, dtype=torch.float32, device=flat.device)
    work[:, -1] = -torch.inf
    work[:, :-1] = rows
    return work if divisor == 1.0 else work.div_(divisor)


class _NLLAndKeptKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        teacher: KeptTeacher,
        shard: Shard,
        wanted: Tensor | None,
        may_overwrite: bool,
    ) -> Tensor:
        lse, nll = combine_stats(torch_local_stats(logits, labels, shard), labels, shard)
        tokens = None if wanted is None else wanted.nonzero()[:, 0]
        known, flat = _known(teacher.top, tokens), logits.detach().flatten(0, 1)
        count, divisor = len(known.ids), _divisor(teacher)
        found = torch.empty(known.log_q.shape, dtype=torch.float32, device=logits.device)
        stats = torch.empty(4, count, dtype=torch.float32, device=logits.device)
        for part in _parts(tokens, len(flat), shard.num_local):
            work, columns = _copied(flat, part, shard, divisor), _columns(known.ids[part.place], shard)
            found[part.place] = mine = work.gather(1, columns)
            lse_others = work.scatter_(1, columns, -torch.inf).logsumexp(dim=1)
            stats[:, part.place] = _local_stats(teacher.compare, mine, lse_others, known.log_q[part.place])
        value, slopes = _combine(teacher.compare, shard.of_all_ranks(stats), found, known)
        kl = value if tokens is None else value.new_zeros(len(flat)).index_copy_(0, tokens, value)
        ctx.save_for_backward(logits, labels, lse, known.ids, *slopes)
        ctx.shard, ctx.divisor, ctx.wanted, ctx.may_overwrite = shard, divisor, wanted, may_overwrite
        return torch.stack([nll, kl.view(labels.shape).masked_fill(labels == -100, 0.0)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse, ids, *slopes = ctx.saved_tensors
        shard, divisor, logits = ctx.shard, ctx.divisor, logits.detach()
        out = logits if ctx.may_overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        nll_factor = gradient_coefficient(upstream[0], labels, shard).flatten()
        kl_factor = upstream[1].float().masked_fill(labels == -100, 0.0).flatten() / divisor
        flat, flat_out, flat_labels, flat_lse = logits.flatten(0, 1), out.flatten(0, 1), labels.flatten(), lse.flatten()
        slopes = _Slopes(*slopes)
        tokens = None if ctx.wanted is None else ctx.wanted.nonzero()[:, 0]
        for part in _parts(tokens, len(flat), shard.num_local):
            factor = kl_factor[part.tokens, None]
            of_kl = _copied(flat, part, shard, divisor).sub_(slopes.shift[part.place, None]).exp_()
            of_kl.mul_(slopes.sign[part.place, None])
            of_kl.scatter_(1, _columns(ids[part.place], shard), slopes.of_top[part.place])
            # Filled, not multiplied by 0: the logits of a masked token may be anything.
            of_kl.mul_(factor).masked_fill_(factor == 0, 0.0)
            at = part.tokens
            both = torch.empty(len(of_kl), flat.shape[1], dtype=torch.float32, device=logits.device)
            torch_write_gradient(flat[at], flat_labels[at], flat_lse[at], nll_factor[at], shard, both)
            both[:, : shard.num_valid] += of_kl[:, :-1]
            flat_out[at] = both.to(out.dtype)
        others = None if ctx.wanted is None else (~ctx.wanted).nonzero()[:, 0]
        for part in _parts(others, len(flat), shard.num_local) if others is not None else ():
            rows, at = flat[part.tokens], part.tokens
            torch_write_gradient(rows, flat_labels[at], flat_lse[at], nll_factor[at], shard, rows)
            flat_out[at] = rows
        return out, None, None, None, None, None


def _divisor(teacher: KeptTeacher) -> float:
    return 1.0 if teacher.compare == "top1" else teacher.temperature
