"""Kept distributions of random tokens, for benchmarks.step: rows as they lie on disk, and scores made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.ops.top_tokens import TopTokens
from remit_megatron.scores.manifest import CacheManifest, KeptDistribution
from remit_megatron.scores.record import from_planes, pack_rows, stored_row, to_planes, unpack_planes

TOP_K = 64


def kept_rows(setting: dict[str, Any], batches: Sequence[Microbatch]) -> list[np.ndarray]:
    """Records [b] of each microbatch."""
    return [_rows(setting, *batch.tokens.shape) for batch in batches]


def with_kept(batches: Sequence[Microbatch], rows: Sequence[np.ndarray]) -> list[Microbatch]:
    """Microbatches with the scores that their records hold, as a source of scores does it."""
    filled = []
    for batch, records in zip(batches, rows, strict=True):
        device = batch.tokens.device
        ref_nll = torch.from_numpy(records["nll"].astype(np.float32) / 2048).to(device)
        filled.append(batch.with_scores(from_planes(unpack_planes(records).to(device), batch.labels, ref_nll)))
    return filled


def _rows(setting: dict[str, Any], samples: int, length: int) -> np.ndarray:
    """Distributions that fall off as a model's do, each over ids at equal distances from a random one on."""
    vocab = setting["shape"].vocab_size
    top_k = min(TOP_K, vocab // 2)
    first = torch.randint(vocab, (samples, length, 1))
    ids = (first + torch.arange(top_k) * (vocab // top_k)) % vocab
    log_probs = (torch.randn(samples, length, top_k + 1) * 2).sort(dim=-1, descending=True).values.log_softmax(-1)
    top = TopTokens(ids=ids.int(), log_probs=log_probs[..., :-1], log_tail=log_probs[..., -1])
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    manifest = CacheManifest(
        reference="random",
        precision="fp32",
        tokenizer=None,
        sequence_length=length,
        data_seed=0,
        document_mask=False,
        eod_mask_loss=False,
        eod_id=None,
        block_samples=1,
        distribution=KeptDistribution(top_k=top_k, temperature=1.0, vocab_size=vocab),
        sources=(),
    )
    planes = to_planes(Scores(entropy=entropy, top=top)).numpy()
    return pack_rows(stored_row(manifest), np.full((samples, length), 4096), planes)
