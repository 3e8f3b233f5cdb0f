"""How sure a reference is of its next token, and which one, from a head whose vocabulary is sharded."""

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.shard import Shard

MAX_VOCAB = 2**24
"""Up to it a column's number is exact in float32, in which the ranks exchange it."""


@torch.no_grad()
def entropy_and_top(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(entropy, most probable token) of softmax(hidden @ weight.T / temperature), logits existing a chunk at a time.

    Args:
        hidden: [n, h] inputs of the head, whole (not sharded over tensor or sequence parallelism).
        weight: [L, h] this rank's rows of the head, of the dtype of `hidden`.
        valid_vocab, tp_group: as in `token_nll`.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        [n] float32 nats and [n] int64, the same bits on all ranks of `tp_group`. Of equally probable tokens the first.

    Collectives: one all-gather of [4, n] float32 where tp_group has several ranks.
    """
    assert hidden.shape[1] == weight.shape[1], f"hidden {hidden.shape} and weight {weight.shape} must be [n, h], [L, h]"
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    shard = Shard.of(weight.shape[0], valid_vocab, tp_group)
    assert shard.valid_vocab <= MAX_VOCAB, f"a vocabulary of {shard.valid_vocab} is above {MAX_VOCAB}"
    stats = torch.empty(4, len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = (hidden[chunk] @ weight.t())[:, : shard.num_valid].to(torch.float32, copy=True)
        stats[:, chunk] = _local_stats(logits.div_(temperature), shard)
    ranks = shard.of_all_ranks(stats)
    log_share = ranks[:, 0] - ranks[:, 0].logsumexp(dim=0)
    # Of all ranks' columns: a rank's own entropy, and that of the choice between ranks. A rank may have no share.
    parts = log_share.exp() * (ranks[:, 1] - log_share.clamp(min=torch.finfo(torch.float32).min))
    owner = ranks[:, 2].argmax(dim=0)
    return parts.sum(dim=0), ranks[:, 3].gather(0, owner[None])[0].long()


def _local_stats(logits: Tensor, shard: Shard) -> Tensor:
    """[4, n]: log-sum-exp of this rank's columns, entropy of their softmax, largest logit, its column in the whole
    vocabulary; (-inf, 0, -inf, 0) where there are no columns. Overwrites the logits."""
    n, columns = logits.shape
    if columns == 0:
        return torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0], device=logits.device)[:, None].expand(4, n)
    column = logits.argmax(dim=1)
    largest = logits.gather(1, column[:, None])[:, 0]
    lse = logits.logsumexp(dim=1)
    log_p = logits.sub_(lse[:, None])
    # Every term has one sign: nothing cancels, whatever the logits' magnitude.
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return torch.stack([lse, entropy, largest, (column + shard.first).float()])
