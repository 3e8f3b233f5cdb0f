"""What is kept of one sample as bytes of a fixed number, and as integers on the way to and from them.

Of a label's score alone: uint16 quanta [s] on disk, float32 nats [s] in a queue. With K tokens of the distribution, a
record of arrays, one after the other:

nll        uint16 [s], float32 in a queue   of the label
entropy    float32 [s]
log_tail   float32 [s]                      logarithm of the mass of all but the K tokens
log_probs  uint16 [s, K]                    quanta, without their sign
ids        uint16 [s, K]                    the low 16 bits
high       uint8 [s, bits, ceil(K / 8)]     of each further bit that the vocabulary needs, one bit a token
"""

import numpy as np
import torch
from torch import Tensor

from remit_megatron.data.microbatch import Scores
from remit_megatron.ops.score_quanta import LARGEST, dequantise, quantise
from remit_megatron.ops.top_tokens import TopTokens
from remit_megatron.scores.manifest import CacheManifest, KeptDistribution

LOW_BITS = 16


def stored_row(manifest: CacheManifest) -> np.dtype:
    """Of one sample on disk."""
    return _row(manifest, "<u2")


def queued_row(manifest: CacheManifest) -> np.dtype:
    """Of one sample in a queue."""
    return _row(manifest, "<f4")


def _row(manifest: CacheManifest, nll: str) -> np.dtype:
    s, kept = manifest.sequence_length, manifest.distribution
    if kept is None:
        return np.dtype((nll, (s,)))
    fields = [
        ("nll", nll, (s,)),
        ("entropy", "<f4", (s,)),
        ("log_tail", "<f4", (s,)),
        ("log_probs", "<u2", (s, kept.top_k)),
        ("ids", "<u2", (s, kept.top_k)),
    ]
    if high_bits(kept):
        fields.append(("high", "u1", (s, high_bits(kept), -(-kept.top_k // 8))))
    return np.dtype(fields)


def high_bits(kept: KeptDistribution) -> int:
    """Bits of an id beyond the low ones."""
    return max(0, (kept.vocab_size - 1).bit_length() - LOW_BITS)


def num_planes(kept: KeptDistribution | None) -> int:
    """Integers a token beside the label's score."""
    return 2 + 2 * kept.top_k if kept is not None else 0


def to_planes(scores: Scores) -> Tensor:
    """[P, b, s] int32: the bits of entropy and log_tail, K quanta of log_probs, -1 for what is no number, and K ids.
    Adding them to zeros changes none of them."""
    assert scores.top is not None, "planes are of a kept distribution"
    assert scores.entropy is not None, "a kept distribution has its entropy"
    reals = torch.stack([scores.entropy.float(), scores.top.log_tail.float()]).view(torch.int32)
    quanta = quantise(-scores.top.log_probs).movedim(-1, 0)
    return torch.cat([reals, quanta, scores.top.ids.movedim(-1, 0).int()])


def from_planes(planes: Tensor, labels: Tensor, ref_nll: Tensor) -> Scores:
    """What `to_planes` was given, with what follows of the label's id. planes [P, b, s]; labels, ref_nll [b, s]."""
    top_k = (len(planes) - 2) // 2
    entropy, log_tail = planes[:2].contiguous().view(torch.float32)
    quanta, ids = (part.movedim(0, -1).contiguous() for part in planes[2:].split(top_k))
    log_probs = torch.where(quanta < 0, torch.nan, -dequantise(quanta))
    agrees = (ids[..., 0] == labels.to(ids.device)).float()
    top = TopTokens(ids=ids, log_probs=log_probs, log_tail=log_tail)
    return Scores(ref_nll=ref_nll, entropy=entropy, agrees=agrees, top=top)


def pack_rows(row: np.dtype, nll: np.ndarray, planes: np.ndarray | None) -> np.ndarray:
    """[n, s] of the score's dtype, or [n] records. nll [n, s] in it; planes [P, n, s] int32."""
    if planes is None:
        return nll.astype(row.base)
    top_k = (len(planes) - 2) // 2
    quanta, ids = (np.moveaxis(part, 0, -1) for part in np.split(planes[2:], [top_k]))
    rows = np.zeros(len(nll), dtype=row)
    rows["nll"] = nll
    rows["entropy"], rows["log_tail"] = planes[:2].copy().view(np.float32)
    rows["log_probs"] = quanta.clip(0, LARGEST)
    rows["ids"] = ids & 0xFFFF
    if row.names is not None and "high" in row.names:
        for bit in range(rows["high"].shape[2]):
            rows["high"][:, :, bit] = np.packbits(ids >> (LOW_BITS + bit) & 1, axis=-1)
    return rows


def unpack_planes(rows: np.ndarray) -> Tensor:
    """[P, n, s] int32 of [n] records."""
    assert rows.dtype.names is not None
    ids = rows["ids"].astype(np.int32)
    if "high" in rows.dtype.names:
        for bit in range(rows["high"].shape[2]):
            taken = np.unpackbits(rows["high"][:, :, bit], axis=-1, count=ids.shape[-1])
            ids |= taken.astype(np.int32) << (LOW_BITS + bit)
    reals = np.stack([rows["entropy"], rows["log_tail"]]).view(np.int32)
    columns = [np.moveaxis(part, -1, 0) for part in (rows["log_probs"].astype(np.int32), ids)]
    return torch.from_numpy(np.concatenate([reals, *columns]))
