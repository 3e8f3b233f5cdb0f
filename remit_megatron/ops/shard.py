"""One rank's columns of the vocabulary, and how the ranks' statistics become one NLL."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Shard:
    """The columns [first, first + num_local) of the vocabulary, of which the leading `num_valid` are in the softmax."""

    first: int
    num_local: int
    num_valid: int
    valid_vocab: int
    tp_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, num_local: int, valid_vocab: int | None, tp_group: dist.ProcessGroup | None) -> "Shard":
        """This rank's shard. `valid_vocab` None: no column is padding. `tp_group` None: not sharded."""
        rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
        total = num_local * size
        valid_vocab = total if valid_vocab is None else valid_vocab
        assert 0 < valid_vocab <= total, f"valid_vocab {valid_vocab} must be in [1, {total}] (columns of all ranks)"
        first = rank * num_local
        return cls(first, num_local, max(0, min(num_local, valid_vocab - first)), valid_vocab, tp_group)

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """This rank's [...] -> [ranks, ...] in their order. One all-gather where the vocabulary is sharded."""
        size = 1 if self.tp_group is None else dist.get_world_size(self.tp_group)
        if size == 1:
            return values[None]
        flat = torch.empty(size * values.numel(), dtype=values.dtype, device=values.device)
        dist.all_gather_into_tensor(flat, values.flatten(), group=self.tp_group)
        return flat.view(size, *values.shape)


def cut_again(rows: Tensor, num_local: int, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Rows [L, h] that each rank holds of one matrix -> [num_local, h], the same matrix in another cut; zeros past its
    last row. One all-gather, and the whole matrix for its time."""
    whole = Shard.of(rows.shape[0], None, tp_group).of_all_ranks(rows).flatten(0, 1)
    first = Shard.of(num_local, None, tp_group).first
    found = whole[first : first + num_local]
    again = rows.new_zeros(num_local, rows.shape[1])
    again[: len(found)] = found
    return again


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Shapes and types only: looking at values would wait for the device."""
    assert labels.shape == logits.shape[:-1], f"labels {labels.shape} must be the leading shape of {logits.shape}"
    assert labels.dtype == torch.int64, f"labels must be int64, got {labels.dtype}"
    assert logits.dtype in (torch.bfloat16, torch.float16, torch.float32), f"no kernel for {logits.dtype} logits"


def combine_stats(stats: Tensor, labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Statistics of this rank's columns -> (log-sum-exp, NLL) over the whole vocabulary, both float32 [...].

    stats: [2, ...] float32, the log-sum-exp of the local columns (-inf where none is valid) and the target logit
    (0 where another rank owns the label). One all-gather over the tensor-parallel group, combined in rank order, so
    all ranks hold the same bits. The NLL of an ignored label is 0; of any other label outside [0, valid_vocab), NaN.
    """
    gathered = shard.of_all_ranks(stats).unbind(0)
    lse, target = gathered[0].unbind(0)
    if len(gathered) > 1:
        largest = torch.stack([one[0] for one in gathered]).amax(dim=0)
        finite = largest.clamp(min=torch.finfo(torch.float32).min)  # -inf - -inf would be nan
        total = (lse - finite).exp()
        for one in gathered[1:]:
            total = total + (one[0] - finite).exp()
            target = target + one[1]
        lse = finite + total.log()
    nll = torch.where(_in_vocabulary(labels, shard), lse - target, torch.nan)
    return lse, torch.where(labels == IGNORED_LABEL, 0.0, nll)


def gradient_coefficient(upstream: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """The factor of (softmax - onehot) in each token's gradient, float32 contiguous [...].

    It is 0 for ignored labels, whatever the upstream gradient, and NaN where the NLL was and is used.
    """
    upstream = upstream.float()
    unused = (labels == IGNORED_LABEL) | (upstream == 0)
    poisoned = torch.where(_in_vocabulary(labels, shard), upstream, torch.nan)
    return torch.where(unused, 0.0, poisoned).contiguous()


def _in_vocabulary(labels: Tensor, shard: Shard) -> Tensor:
    return (labels >= 0) & (labels < shard.valid_vocab)
