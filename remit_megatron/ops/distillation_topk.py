"""KL over the reference's k most probable tokens and a bucket for all others, over a sharded vocabulary.

Merging outcomes never raises a KL, so this is a lower bound of the KL over the whole vocabulary, equal to it where k
covers that, in either direction. Unlike a top k that is normalised anew, it does not let the student's mass outside go
free.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remit_megatron.ops.shard import Shard


class _Top(NamedTuple):
    """Of n tokens, the reference's k most probable columns of the whole vocabulary that this rank holds."""

    columns: Tensor
    """[n, K] int64 local columns, the most probable first; K = min(k, columns)."""
    num_taken: Tensor
    """[n] int64: so many of them, from the left, are among the k."""

    @property
    def taken(self) -> Tensor:
        return torch.arange(self.columns.shape[1], device=self.columns.device) < self.num_taken[:, None]


class TopK:
    """The forward comparison of `nll_and_kl` with `teacher.top_k`."""

    def __init__(self, k: int, shard: Shard):
        self.k, self.shard = k, shard
        self._tops: list[_Top] = []

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[5, n]: log-sum-exps of student and reference over the columns among the k, over all others, and the mean of
        r - x under softmax(r) over those among the k (0: none)."""
        top = self._choose(r)
        self._tops.append(top)
        taken, sides = top.taken, []
        for logits in (x, r):
            found = logits.gather(1, top.columns)
            chosen = found.masked_fill(~taken, -torch.inf)
            others = logits.scatter(1, top.columns, found.masked_fill(taken, -torch.inf))
            sides.append((chosen, _lse(chosen), _lse(others)))
        (x, x_top, x_tail), (r, r_top, r_tail) = sides
        return torch.stack([x_top, r_top, x_tail, r_tail, self._mean_gap(taken, x, x_top, r, r_top)])

    def _mean_gap(self, taken: Tensor, x: Tensor, x_top: Tensor, r: Tensor, r_top: Tensor) -> Tensor:
        return _mean(taken, r, r_top, x)

    def combine(self, stats: Tensor) -> Tensor:
        """As of the whole vocabulary, over the k alone; and the tail as one outcome more."""
        ranks = self.shard.of_all_ranks(stats)
        x_top, r_top, self._x_tail, self._r_tail = (ranks[:, i].logsumexp(dim=0) for i in range(4))
        self._x_lse, self._r_lse = torch.logaddexp(x_top, self._x_tail), torch.logaddexp(r_top, self._r_tail)
        shift = self._r_lse - self._x_lse
        of_top = ((ranks[:, 1] - self._r_lse).exp() * ranks[:, 4]).sum(dim=0) - (r_top - self._r_lse).exp() * shift
        # Without columns in the tail both log-sum-exps are -inf.
        of_tail = (self._r_tail - self._r_lse).exp() * (self._r_tail - self._x_tail - shift)
        return of_top + of_tail.where(self._r_tail > -torch.inf, 0.0)

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """p - q of the k, and of the others p - p Q / P with Q, P the tails of reference and student."""
        top = self._tops[number]
        p = (x - self._x_lse[chunk, None]).exp_()
        chosen = p.gather(1, top.columns) - (r.gather(1, top.columns) - self._r_lse[chunk, None]).exp_()
        # p / P, which is at most 1, before the product: P alone may be too small for float32.
        share = (x - self._x_tail[chunk, None]).exp_().nan_to_num_(posinf=0.0)
        p.sub_(share.mul_((self._r_tail - self._r_lse)[chunk, None].exp()))
        return p.scatter_(1, top.columns, torch.where(top.taken, chosen, p.gather(1, top.columns)))

    def _choose(self, r: Tensor) -> _Top:
        """Of equal ones at the border, lower ranks' come first. One all-gather of [n, K] float32 where sharded."""
        width = min(self.k, self.shard.num_local)
        values, columns = r.topk(min(width, r.shape[1]), dim=1)
        missing = width - values.shape[1]  # this rank has padding instead of columns
        ranks = self.shard.of_all_ranks(torch.nn.functional.pad(values, (0, missing), value=-torch.inf))
        best = ranks.transpose(0, 1).flatten(1).argsort(dim=1, descending=True, stable=True)[:, : self.k]
        num_taken = (best // width == self.shard.first // self.shard.num_local).sum(dim=1)
        return _Top(columns, num_taken.clamp_(max=columns.shape[1]))


class ReverseTopK(TopK):
    """The reverse comparison of `nll_and_kl` with `teacher.top_k`."""

    def _mean_gap(self, taken: Tensor, x: Tensor, x_top: Tensor, r: Tensor, r_top: Tensor) -> Tensor:
        """In place of the forward one: of x - r under softmax(x)."""
        return _mean(taken, x, x_top, r)

    def combine(self, stats: Tensor) -> Tensor:
        """sum over the k of p (x - r - shift), with shift the difference of both log-sum-exps, and the tail as one
        outcome more."""
        ranks = self.shard.of_all_ranks(stats)
        x_top, r_top, x_tail, r_tail = (ranks[:, i].logsumexp(dim=0) for i in range(4))
        self._x_lse = torch.logaddexp(x_top, x_tail)
        self._shift = self._x_lse - torch.logaddexp(r_top, r_tail)
        of_top = ((ranks[:, 0] - self._x_lse).exp() * ranks[:, 4]).sum(dim=0)
        of_top = of_top - (x_top - self._x_lse).exp() * self._shift
        # Without columns in the tail both log-sum-exps are -inf.
        self._tail_ratio = (x_tail - r_tail - self._shift).where(x_tail > -torch.inf, 0.0)
        self._kl = of_top + (x_tail - self._x_lse).exp() * self._tail_ratio
        return self._kl

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """p times how far log p - log q, of the tail log P - log Q, is above the KL."""
        top = self._tops[number]
        of_tail = self._tail_ratio[chunk, None]
        ratio = x.gather(1, top.columns) - r.gather(1, top.columns) - self._shift[chunk, None]
        above = of_tail.repeat(1, x.shape[1]).scatter_(1, top.columns, torch.where(top.taken, ratio, of_tail))
        return x.sub_(self._x_lse[chunk, None]).exp_().mul_(above.sub_(self._kl[chunk, None]))


def _mean(taken: Tensor, logits: Tensor, lse: Tensor, other: Tensor) -> Tensor:
    """Mean of logits - other [n, K] under the softmax of the taken logits, whose log-sum-exp is lse [n]; 0: none."""
    gap = torch.where(taken, logits - other, 0.0)
    return ((logits - lse[:, None]).exp().masked_fill(~taken, 0.0) * gap).sum(dim=1)


def _lse(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)
