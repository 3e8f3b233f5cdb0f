"""The NLL of a linear head whose logits exist a chunk at a time: the frozen reference's last step."""

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.implementation import Implementation
from remit_megatron.ops.shard import Shard, combine_stats
from remit_megatron.ops.token_nll import local_stats


@torch.no_grad()
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    implementation: Implementation = "auto",
) -> Tensor:
    """`token_nll(hidden @ weight.T, labels)` without gradient and without more than one chunk of logits.

    Args:
        hidden: [n, h] inputs of the head, whole (not sharded over tensor or sequence parallelism).
        weight: [L, h] this rank's rows of the head, of the dtype of `hidden`.
        labels: [n] int64, -100 for a token to ignore.
        valid_vocab, tp_group, implementation: as in `token_nll`.
        chunk_tokens: tokens whose logits exist at one time, chunk_tokens * L numbers of the dtype of `hidden`. The
            head is read once a chunk, so small chunks cost bandwidth.

    Returns:
        [n] float32, nats; 0 for ignored labels. With chunk_tokens >= n the bits are those of
        `token_nll(hidden @ weight.T, labels)`.

    Collectives: one all-gather of [2, n] float32 for the whole call where tp_group has several ranks.
    """
    assert hidden.dim() == weight.dim() == 2, f"hidden {hidden.shape} and weight {weight.shape} must be matrices"
    assert hidden.shape[1] == weight.shape[1], (
        f"hidden {hidden.shape} and weight {weight.shape} must be [n, h] and [L, h]"
    )
    assert labels.shape == hidden.shape[:1], f"labels {labels.shape} must be [n] for hidden {hidden.shape}"
    assert chunk_tokens > 0, f"chunk_tokens must be positive, got {chunk_tokens}"
    num_tokens, num_local = hidden.shape[0], weight.shape[0]
    shard = Shard.of(num_local, valid_vocab, tp_group)
    stats = torch.empty(2, num_tokens, dtype=torch.float32, device=hidden.device)
    buffer = hidden.new_empty(min(chunk_tokens, num_tokens), num_local)
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        logits = buffer[: chunk.stop - chunk.start]
        torch.mm(hidden[chunk], weight.t(), out=logits)
        stats[:, chunk] = local_stats(logits, labels[chunk], shard, implementation=implementation)
    return combine_stats(stats, labels, shard)[1]
