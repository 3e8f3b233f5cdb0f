"""What is kept of a distribution over a sharded vocabulary: its most probable tokens, the mass of all others, and what
was computed over the whole of it before anything was dropped."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.ops.implementation import Implementation
from remit_megatron.ops.score_quanta import round_to_quanta
from remit_megatron.ops.shard import Shard, combine_stats
from remit_megatron.ops.token_nll import local_stats


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTokens:
    """The K most probable tokens of each distribution, softmax(logits / temperature), and one outcome for all others.

    A masked entry may hold anything, but for ids, which lie in the vocabulary.
    """

    ids: Tensor
    """[..., K] int32 columns of the whole vocabulary, each once, the most probable first; of equal ones the lower
    first. Which of equal ones at the border are among the K is left open."""
    log_probs: Tensor
    """[..., K] float32, in whole quanta of `ops.score_quanta`, 0 to -31.9995; so they add up to 1 nearly."""
    log_tail: Tensor
    """[...] float32: the logarithm of all other tokens' mass; -inf where K covers the vocabulary."""


class Summary(NamedTuple):
    """What is kept of n tokens' distributions."""

    nll: Tensor
    """[n] float32 nats: of the label, at temperature 1; 0 where ignored."""
    entropy: Tensor
    """[n] float32 nats: at the temperature, over the whole vocabulary."""
    top: TopTokens
    """[n, K] and [n]: at the temperature."""


@torch.no_grad()
def summarise(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    implementation: Implementation = "auto",
) -> Summary:
    """What is kept of softmax(hidden @ weight.T / temperature), logits existing a chunk at a time.

    Args:
        hidden: [n, h] inputs of the head, whole (not sharded over tensor or sequence parallelism).
        weight: [L, h] this rank's rows of the head, of the dtype of `hidden`.
        labels: [n] int64, -100 for a token to ignore.
        top_k: K, at most the vocabulary.
        valid_vocab, tp_group, implementation: as in `token_nll`, whose bits the NLL has.
        chunk_tokens: tokens whose logits exist at one time.

    Returns the same bits on all ranks of `tp_group`.

    Collectives, where tp_group has several ranks: an all-gather of [5 + K, chunk] float32 and one of [chunk, K] int32
    for each chunk of tokens.
    """
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    shard = Shard.of(weight.shape[0], valid_vocab, tp_group)
    assert 0 < top_k <= shard.valid_vocab, f"top_k {top_k} must be in [1, {shard.valid_vocab}]"
    parts = []
    for start in range(0, max(len(hidden), 1), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = hidden[chunk] @ weight.t()
        stats = local_stats(logits, labels[chunk], shard, implementation=implementation)
        scaled = logits[:, : shard.num_valid].to(torch.float32, copy=True).div_(temperature)
        parts.append(_merged(stats, labels[chunk], _candidates(scaled, top_k, shard), shard))
    nll, entropy, ids, log_probs, log_tail = (torch.cat(column) for column in zip(*parts, strict=True))
    return Summary(nll, entropy, TopTokens(ids=ids, log_probs=log_probs, log_tail=log_tail))


class _Candidates(NamedTuple):
    """Of this rank's columns, n tokens."""

    lse: Tensor
    """[n], of all columns; -inf where there are none, as in what follows."""
    entropy: Tensor
    """[n], of their softmax."""
    lse_others: Tensor
    """[n], of all but the candidates."""
    values: Tensor
    """[n, K] logits, falling; -inf where there are no more columns."""
    ids: Tensor
    """[n, K] int32 in the whole vocabulary; 0 where there are no more."""


def _candidates(logits: Tensor, top_k: int, shard: Shard) -> _Candidates:
    """Overwrites the logits [n, num_valid] float32."""
    num_columns = logits.shape[1]
    width = min(top_k, num_columns)
    columns = logits.topk(width, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = logits.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    lse = _lse(logits)
    if num_columns:
        log_p = logits - lse[:, None]
        entropy = -(log_p.exp() * log_p).sum(dim=1)
    else:
        entropy = torch.zeros_like(lse)
    lse_others = _lse(logits.scatter_(1, columns, -torch.inf))
    missing = (0, top_k - width)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    ids = torch.nn.functional.pad(columns + shard.first, missing).int()
    return _Candidates(lse, entropy, lse_others, values, ids)


def _merged(nll_stats: Tensor, labels: Tensor, mine: _Candidates, shard: Shard) -> tuple[Tensor, ...]:
    """(nll, entropy, ids, log_probs, log_tail) over the whole vocabulary."""
    nll = combine_stats(nll_stats, labels, shard)[1]
    numbers = torch.cat([torch.stack(mine[:3]), mine.values.t()])
    numbers, ids = shard.of_all_ranks(numbers), shard.of_all_ranks(mine.ids)
    lse = numbers[:, 0].logsumexp(dim=0)
    log_share = numbers[:, 0] - lse
    # A rank's own entropy, and that of the choice between ranks. A rank may have no share.
    parts = log_share.exp() * (numbers[:, 1] - log_share.clamp(min=torch.finfo(torch.float32).min))
    values = numbers[:, 3:].permute(2, 0, 1).flatten(1)
    ids = ids.transpose(0, 1).flatten(1)
    # Ranks hold rising columns, so that a stable order has the lower of equal ones first.
    values, order = values.sort(dim=1, descending=True, stable=True)
    top_k = mine.ids.shape[1]
    rest = torch.cat([values[:, top_k:], numbers[:, 2].t()], dim=1)
    log_probs = -round_to_quanta(lse[:, None] - values[:, :top_k])
    return nll, parts.sum(dim=0), ids.gather(1, order[:, :top_k]), log_probs, rest.logsumexp(dim=1) - lse


def _lse(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)
