"""What a microbatch is: whole samples as the loader makes them, and the part of them that one rank computes on.

Letters in shapes: b samples, s positions of a whole sample, s/cp those of this context-parallel rank, h hidden size.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from remit_megatron.data.deal import Deal
from remit_megatron.errors import UserError
from remit_megatron.ops.routing import Routed
from remit_megatron.ops.top_tokens import TopTokens

Record = TypeVar("Record", bound="Scores | TopTokens | Routed | Microbatch | LocalMicrobatch")

PACKED = "packed lengths are not read: give `documents`, the document of each input token"
REFUSED = {
    "attention_mask": "attention is causal, and stays inside documents where the batch has `documents`: leave the mask "
    "out (GPTDatasetConfig.create_attention_mask = False, --no-create-attention-mask-in-dataloader)",
    "cu_seqlens": PACKED,
    "max_seqlen": PACKED,
    "packed_seq_params": PACKED,
}
"""How keys of other forward steps' batches begin, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a frozen model says of a microbatch's labels: of this rank's positions, on its device.

    They are on the ranks of the last pipeline stage, where the loss is; elsewhere a microbatch has none. A masked entry
    may hold anything, also what is not finite. Each field is None where no objective asked for it.
    """

    ref_nll: Tensor | None = None
    """[b, s/cp] float32: the negative log-likelihood of each label, nats."""
    hidden: Tensor | None = None
    """[b, s/cp, h] of the head's dtype: inputs of the model's head, from which its whole distribution follows."""
    entropy: Tensor | None = None
    """[b, s/cp] float32: the entropy of the distribution over the vocabulary, nats."""
    agrees: Tensor | None = None
    """[b, s/cp] float32: 1 where the most probable token is the label, else 0."""
    top: TopTokens | None = None
    """[b, s/cp, K] and [b, s/cp]: the most probable tokens, at the temperature of `entropy`; in place of `hidden`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Whole samples, the same on every rank of a model. `scores`, `selected`, `routed` are of this rank's positions."""

    tokens: Tensor
    """[b, s] int64: ids of the input tokens, on every position."""
    labels: Tensor
    """[b, s] int64: id of the token that follows each. A masked entry may hold anything."""
    loss_mask: Tensor
    """[b, s]: 1 where the label is trained on, 0 elsewhere; any dtype that compares with 0."""
    position_ids: Tensor | None = None
    """[b, s] int64: handed to the model, which must be one that reads them where they are not 0..s-1. None: 0..s-1."""
    segment_ids: Tensor | None = None
    """[b, s] int64: the document of each label, counted within its sample and below s. A masked entry may hold
    anything."""
    documents: Tensor | None = None
    """[b, s] int64: the document of each input token, for attention inside documents. None: attention over all."""
    sample_id: Tensor | None = None
    """[b] int64: identity of each sample."""
    scores: Scores | None = None
    """Of the frozen reference, once these are known on this rank."""
    selected: Tensor | None = None
    """[b, s/cp] float32: 1 where a selection over the whole step took the token, 0 elsewhere and where masked."""
    routed: Routed | None = None
    """What a choice by the reference's scores made of the tokens."""

    @property
    def num_samples(self) -> int:
        """b."""
        return self.tokens.size(0)

    @property
    def length(self) -> int:
        """s, positions of a whole sample."""
        return self.tokens.size(1)

    @classmethod
    def from_dict(cls, batch: Mapping[str, Any], deal: Deal) -> "Microbatch":
        """A microbatch from the plain dict of a script of one's own: keys are the names of the fields above.

        `ref_nll` [b, s] float32, scores of whole samples, becomes `scores` of this rank's positions. A key whose value
        is None counts as absent. Raises UserError for a missing key, naming it; for a key that nothing here reads,
        since to train on as if it were not there would be another objective; and for a batch that was cut for context
        parallelism already, as far as that shows.
        """
        given = {key: value for key, value in batch.items() if value is not None}
        for key in given:
            if key not in BATCH_KEYS:
                raise UserError(f"the batch's '{key}' is not read: {_remedy(key)}")
        for key in ("tokens", "labels", "loss_mask"):
            if key not in given:
                raise UserError(f"the batch has no '{key}': tokens, labels and loss_mask are needed, [b, s] each")
        _check_shapes(given, deal)
        ref_nll = given.pop("ref_nll", None)
        scores = None if ref_nll is None else Scores(ref_nll=deal.cut(ref_nll))
        return cls(**given, scores=scores)

    @classmethod
    def concatenate(cls, parts: Sequence["Microbatch"]) -> "Microbatch":
        """One microbatch of all samples of several, which have the same fields."""
        return parts[0] if len(parts) == 1 else _joined(parts)

    def with_scores(self, scores: Scores | None) -> "Microbatch":
        return dataclasses.replace(self, scores=scores)

    def with_selected(self, selected: Tensor | None) -> "Microbatch":
        return dataclasses.replace(self, selected=selected)

    def with_routed(self, routed: Routed | None) -> "Microbatch":
        return dataclasses.replace(self, routed=routed)

    def to(self, device: torch.device) -> "Microbatch":
        """On another device, without waiting for the copy where memory is pinned."""
        return _mapped(self, lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Microbatch":
        """In page-locked memory of the host, from which copies to a GPU do not wait."""
        return _mapped(self, Tensor.pin_memory)

    def local(self, deal: Deal, device: torch.device) -> "LocalMicrobatch":
        """What this rank computes on, on its device."""
        batch = self.to(device)
        position_ids = batch.position_ids
        if position_ids is None:
            position_ids = torch.arange(self.length, device=device).expand_as(batch.tokens)
        return LocalMicrobatch(
            tokens=deal.cut(batch.tokens),
            labels=deal.cut(batch.labels),
            loss_mask=deal.cut(batch.loss_mask),
            position_ids=deal.cut(position_ids),
            positions=deal.positions(self.length, device),
            segment_ids=None if batch.segment_ids is None else deal.cut(batch.segment_ids),
            documents=batch.documents,
            sample_id=batch.sample_id,
            scores=batch.scores,
            selected=batch.selected,
            routed=batch.routed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalMicrobatch:
    """This context-parallel rank's positions of a microbatch, on the model's device. Fields as in `Microbatch`."""

    tokens: Tensor
    """[b, s/cp] int64."""
    labels: Tensor
    """[b, s/cp] int64. A masked entry may hold anything."""
    loss_mask: Tensor
    """[b, s/cp]: 1 where the label is trained on, 0 elsewhere."""
    position_ids: Tensor
    """[b, s/cp] int64."""
    positions: Tensor
    """[s/cp] int64: place of each position in the whole sample, the same for all samples."""
    segment_ids: Tensor | None = None
    """[b, s/cp] int64, counted within the whole sample."""
    documents: Tensor | None = None
    """[b, s] int64, the one field of whole samples: attention compares each query with all keys."""
    sample_id: Tensor | None = None
    """[b] int64."""
    scores: Scores | None = None
    """None also on ranks that compute no loss."""
    selected: Tensor | None = None
    """[b, s/cp] float32."""
    routed: Routed | None = None
    """[b, s/cp] each."""


BATCH_KEYS = {field.name for field in dataclasses.fields(Microbatch)} - {"scores", "selected", "routed"} | {"ref_nll"}
"""Keys of a script's own batch."""


def _remedy(key: str) -> str:
    for start, remedy in REFUSED.items():
        if key.startswith(start):
            return remedy
    near = difflib.get_close_matches(key, BATCH_KEYS, n=1)
    known = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(BATCH_KEYS))}"
    return f"{known} Leave it out where it is for another forward step"


def _check_shapes(batch: Mapping[str, Tensor], deal: Deal) -> None:
    shape = tuple(batch["tokens"].shape)
    for key, value in batch.items():
        wanted = shape[:1] if key == "sample_id" else shape
        if tuple(value.shape) != wanted or len(shape) != 2:
            letters = "[b]" if key == "sample_id" else "[b, s]"
            raise UserError(
                f"the batch's '{key}' has the shape {list(value.shape)}: it must be {letters} of whole samples, and "
                f"tokens are {list(shape)}"
            )
    if deal.cp_size == 1:
        return
    length = shape[1]
    # A cut leaves each rank a chunk from the samples' second half, whose positions are past the length of the part.
    if "position_ids" in batch and int(batch["position_ids"].max()) >= length:
        raise UserError(
            f"the batch was cut for context parallelism already: its position_ids go beyond its {length} positions: "
            "give whole samples (no get_batch_on_this_cp_rank), which the forward step cuts itself"
        )
    if length % (2 * deal.cp_size):
        raise UserError(
            f"the batch's {length} positions do not divide by 2 x {deal.cp_size} context-parallel ranks: give whole "
            "samples, of a length that does"
        )


def _mapped(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The record with every tensor of it changed, those of the records in it included."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Scores | TopTokens | Routed):
            changed[field.name] = _mapped(value, change)
        elif value is not None:
            changed[field.name] = change(value)
    return dataclasses.replace(record, **changed)


def _joined(parts: Sequence[Record]) -> Record:
    """All tensors concatenated along samples."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(parts[0]):
        values: list[Any] = [getattr(part, field.name) for part in parts]
        absent = [value is None for value in values]
        assert all(absent) or not any(absent), f"only some microbatches have {field.name}"
        if not any(absent):
            joined[field.name] = (
                _joined(values) if isinstance(values[0], Scores | TopTokens | Routed) else torch.cat(values)
            )
    return dataclasses.replace(parts[0], **joined)
