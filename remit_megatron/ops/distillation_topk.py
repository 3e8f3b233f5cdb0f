"""Forward KL over the reference's k most probable tokens and a bucket for all others, over a sharded vocabulary.

Merging outcomes never raises a KL, so this is a lower bound of the KL over the whole vocabulary, equal to it where k
covers that. Unlike a top k that is normalised anew, it does not let the student's mass outside go free.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remit_megatron.ops.distillation import Teacher, chunks_of, write_both_gradients
from remit_megatron.ops.shard import Shard, combine_stats
from remit_megatron.ops.token_nll import torch_local_stats


class _Top(NamedTuple):
    """Of n tokens, the reference's k most probable columns of the whole vocabulary that this rank holds."""

    columns: Tensor
    """[n, K] int64 local columns, the most probable first; K = min(k, columns)."""
    num_taken: Tensor
    """[n] int64: so many of them, from the left, are among the k."""

    @property
    def taken(self) -> Tensor:
        return torch.arange(self.columns.shape[1], device=self.columns.device) < self.num_taken[:, None]


class NLLAndTopKL(torch.autograd.Function):
    """`nll_and_kl` with `teacher.top_k`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Teacher, shard: Shard, may_overwrite: bool
    ) -> Tensor:
        lse, nll = combine_stats(torch_local_stats(logits, labels, shard), labels, shard)
        stats = torch.empty(5, labels.numel(), dtype=torch.float32, device=logits.device)
        tops = []
        for chunk, x, r in chunks_of(logits, teacher, shard):
            tops.append(_choose(r, teacher.top_k, shard))
            stats[:, chunk] = _local_stats(x, r, tops[-1])
        kl, sides = _combine(stats, shard)
        kl = kl.view(labels.shape).masked_fill(labels == -100, 0.0)
        ctx.save_for_backward(logits, labels, lse, sides, *(part for top in tops for part in top))
        ctx.teacher, ctx.shard, ctx.may_overwrite = teacher, shard, may_overwrite
        return torch.stack([nll, kl])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse, sides, *parts = ctx.saved_tensors
        tops = [_Top(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        student_lse, reference_lse, student_tail, reference_tail = sides.unbind()

        def difference(number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
            """p - q of the k, and of the others p - p Q / P with Q, P the tails of reference and student."""
            top = tops[number]
            p = (x - student_lse[chunk, None]).exp_()
            chosen = p.gather(1, top.columns) - (r.gather(1, top.columns) - reference_lse[chunk, None]).exp_()
            # p / P, which is at most 1, before the product: P alone may be too small for float32.
            share = (x - student_tail[chunk, None]).exp_().nan_to_num_(posinf=0.0)
            p.sub_(share.mul_((reference_tail - reference_lse)[chunk, None].exp()))
            return p.scatter_(1, top.columns, torch.where(top.taken, chosen, p.gather(1, top.columns)))

        out = write_both_gradients(
            logits, labels, lse, upstream, ctx.teacher, ctx.shard, difference, may_overwrite=ctx.may_overwrite
        )
        return out, None, None, None, None


def _choose(reference: Tensor, k: int, shard: Shard) -> _Top:
    """reference: [n, columns] local logits. Of equal ones at the border, lower ranks' come first.

    One all-gather of [n, K] float32 where the vocabulary is sharded.
    """
    width = min(k, shard.num_local)
    values, index = reference.topk(min(width, reference.shape[1]), dim=1)
    missing = width - values.shape[1]  # ranks have padding instead of columns
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    group = shard.tp_group
    if group is None or dist.get_world_size(group) == 1:
        count = torch.full_like(values[:, 0], min(k, index.shape[1]), dtype=torch.int64)
        return _Top(index, count)
    ranks = torch.empty(dist.get_world_size(group), *values.shape, dtype=values.dtype, device=values.device)
    dist.all_gather_into_tensor(ranks.flatten(), values.flatten(), group=group)
    candidates = ranks.transpose(0, 1).flatten(1)
    best = candidates.argsort(dim=1, descending=True, stable=True)[:, :k]
    count = (best // width == dist.get_rank(group)).sum(dim=1)
    return _Top(index, count.clamp_(max=index.shape[1]))


def _local_stats(student: Tensor, reference: Tensor, top: _Top) -> Tensor:
    """[5, n] float32 of the local columns: log-sum-exps of student and reference over those among the k, over all
    others, and the mean of reference - student under the reference's softmax over those among the k (0: none)."""
    n = len(student)
    taken, sides = top.taken, []
    for logits in (student, reference):
        chosen = logits.gather(1, top.columns).masked_fill(~taken, -torch.inf)
        others = logits.scatter(1, top.columns, torch.where(taken, -torch.inf, logits.gather(1, top.columns)))
        sides.append((chosen, _lse(chosen, n), _lse(others, n)))
    (x, x_top, x_tail), (r, r_top, r_tail) = sides
    gap = torch.where(taken, r - x, 0.0)
    mean = ((r - r_top[:, None]).exp().masked_fill(~taken, 0.0) * gap).sum(dim=1)
    return torch.stack([x_top, r_top, x_tail, r_tail, mean])


def _lse(logits: Tensor, n: int) -> Tensor:
    return logits.logsumexp(dim=1) if logits.shape[1] else logits.new_full((n,), -torch.inf)


def _combine(stats: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Local statistics -> KL [n], and [4, n]: log-sum-exps of student and reference over all columns, over the tail."""
    ranks = stats[None]
    if shard.tp_group is not None and dist.get_world_size(shard.tp_group) > 1:
        ranks = torch.empty(dist.get_world_size(shard.tp_group), *stats.shape, device=stats.device)
        dist.all_gather_into_tensor(ranks.flatten(), stats.flatten(), group=shard.tp_group)
    x_top, r_top, x_tail, r_tail = (ranks[:, i].logsumexp(dim=0) for i in range(4))
    student, reference = torch.logaddexp(x_top, x_tail), torch.logaddexp(r_top, r_tail)
    shift = reference - student
    of_top = ((ranks[:, 1] - reference).exp() * ranks[:, 4]).sum(dim=0) - (r_top - reference).exp() * shift
    # Without columns in the tail both log-sum-exps are -inf.
    of_tail = (r_tail - reference).exp() * (r_tail - x_tail - shift)
    kl = of_top + of_tail.where(r_tail > -torch.inf, 0.0)
    return kl, torch.stack([student, reference, x_tail, r_tail])
