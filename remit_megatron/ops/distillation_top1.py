"""The reference's most probable token as a hard label, found over a sharded vocabulary."""

import torch
from torch import Tensor

from remit_megatron.ops.shard import Shard


class MostProbable:
    """A comparison of `nll_and_kl`: the student's NLL of the token that the reference finds most probable. Of equally
    probable ones the first column of the vocabulary counts."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self._columns: list[Tensor] = []

    def local_stats(self, x: Tensor, r: Tensor) -> Tensor:
        """[3, n]: the student's log-sum-exp and the reference's largest logit, both -inf where there are no columns,
        and the student's logit there."""
        n, columns = x.shape
        if columns == 0:
            self._columns.append(torch.zeros(n, dtype=torch.int64, device=x.device))
            return torch.tensor([-torch.inf, -torch.inf, 0.0], device=x.device)[:, None].expand(3, n)
        best = r.argmax(dim=1)
        self._columns.append(best)
        return torch.stack([x.logsumexp(dim=1), *(of.gather(1, best[:, None])[:, 0] for of in (r, x))])

    def combine(self, stats: Tensor) -> Tensor:
        ranks = self.shard.of_all_ranks(stats)
        self._lse = ranks[:, 0].logsumexp(dim=0)
        owner = ranks[:, 1].argmax(dim=0)
        self._is_here = owner == self.shard.first // self.shard.num_local
        return self._lse - ranks[:, 2].gather(0, owner[None])[0]

    def difference(self, number: int, chunk: slice, x: Tensor, r: Tensor) -> Tensor:
        """p, less 1 at the label."""
        p = x.sub_(self._lse[chunk, None]).exp_()
        if p.shape[1]:
            p.scatter_add_(1, self._columns[number][:, None], -self._is_here[chunk, None].float())
        return p
