"""The hook into Megatron-Core's loss path: a language model whose loss is the sharded token NLL of this package.

Megatron's own cross-entropy is left untouched and unused: it writes into float32 logits, lets padded columns into the
softmax and gives masked labels a gradient. `compute_language_model_loss` is the one method every Megatron language
model calls with the labels and the sharded logits, so overriding it in a subclass reaches its caller in every version;
patching the symbol it uses would not reach callers that imported it earlier.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Self, cast

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore import compat
from remit_megatron.mcore.heads import Chunked, HiddenLayer, Logits, LossHead, Vocabulary
from remit_megatron.ops.implementation import Implementation
from remit_megatron.ops.shard import cut_again


class LossHook(torch.nn.Module):
    """What makes a language model of Megatron-Core return the NLL of each label, [b, s/cp] float32 in nats.

    To be inherited before the model's class, whose arguments it takes, and:
      valid_vocab: rows of the vocabulary without padding; default: all rows of `vocab_size`. Columns past it are not
        in the softmax and get no gradient.
      scorer: a frozen model that only ever yields NLL. Its head computes logits for `head_chunk_tokens` tokens at a
        time and never holds more; it cannot return logits.
      loss_head: "logits", or "sequence_chunks": the head's logits then exist for one sample at a time. A training
        forward needs the loss for that: it runs inside `using(BySequence(...))`. It cannot return logits either.
      loss_implementation: as in `token_nll`.

    Inside `using(head)` a call with labels returns what that head makes of them; see `remit_megatron.mcore.heads`.
    `loss_calls` counts the hook's calls, by which a trainer proves that the loss it reports is the one it trains on.
    """

    config: Any
    decoder: Any
    output_layer: Any
    pg_collection: Any
    position_embedding_type: str
    post_process: bool
    share_embeddings_and_output_weights: bool
    shared_embedding_or_output_weight: Any
    vocab_size: int

    def __init__(
        self,
        *args: Any,
        valid_vocab: int | None = None,
        scorer: bool = False,
        head_chunk_tokens: int = 2048,
        loss_head: str = "logits",
        loss_implementation: Implementation = "auto",
        **kwargs: Any,
    ):
        compat.silence_deprecation()
        _refuse(args[0] if args else kwargs["config"])
        super().__init__(*args, **kwargs)
        self.take_over_loss(
            valid_vocab=valid_vocab,
            scorer=scorer,
            head_chunk_tokens=head_chunk_tokens,
            loss_head=loss_head,
            loss_implementation=loss_implementation,
        )

    def take_over_loss(
        self,
        *,
        valid_vocab: int | None = None,
        scorer: bool = False,
        head_chunk_tokens: int = 2048,
        loss_head: str = "logits",
        loss_implementation: Implementation = "auto",
    ) -> None:
        """What the constructor adds to a GPTModel that is built; see `hooked`. Raises UserError for what cannot be."""
        assert loss_head in ("logits", "sequence_chunks"), f"unknown loss_head '{loss_head}'"
        self.mtp_heads: int = getattr(self.config, "mtp_num_layers", None) or 0
        """Heads of multi-token prediction: they call the hook one after the other, before the model's own head does."""
        self.valid_vocab: int = self.vocab_size if valid_vocab is None else valid_vocab
        self.head_chunk_tokens = head_chunk_tokens
        self.loss_implementation: Implementation = loss_implementation
        self.loss_calls = 0
        self.scorer = scorer
        self._rows: Tensor | None = None
        self.by_sequence = loss_head == "sequence_chunks" and not scorer
        """Whether a training forward needs the loss of a sequence."""
        if self.by_sequence:
            _refuse_for_sequence_chunks(self.config, self.mtp_heads)
        self.takes_hidden = scorer or self.by_sequence
        """Whether the output layer hands hidden states on in place of logits."""
        self.head: LossHead = Chunked(head_chunk_tokens) if self.takes_hidden else Logits()
        if self.post_process and self.takes_hidden:
            # Same parameters, another forward; so checkpoints and tied weights stay Megatron's.
            self.output_layer.__class__ = HiddenLayer
        if scorer:
            self.eval().requires_grad_(False)

    def device_of_weights(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Self:
        super().train(mode and not self.scorer)
        return self

    def head_weight(self) -> Tensor:
        """The head's rows on this rank, [V/tp, h]; the embedding's where they are tied."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def head_rows(self, num_local: int) -> Tensor:
        """The rows [num_local, h] of a frozen head where every rank has so many columns of the vocabulary, zeros past
        its last. Collective over tensor parallelism; another cut than its own is copied once and kept."""
        weight = self.head_weight()
        if len(weight) == num_local:
            return weight
        assert self.scorer, "only a frozen head keeps its rows in another cut"
        if self._rows is None or len(self._rows) != num_local:
            self._rows = cut_again(weight, num_local, self.pg_collection.tp)
        return self._rows

    @contextlib.contextmanager
    def using(self, head: LossHead) -> Iterator[None]:
        """Calls with labels return what `head` makes of them, on the last pipeline stage."""
        wanted, found = (("hidden states" if hidden else "logits") for hidden in (head.takes_hidden, self.takes_hidden))
        assert wanted == found, f"{type(head).__name__} takes {wanted}, and this model's output layer gives {found}"
        before, self.head = self.head, head
        try:
            yield
        finally:
            self.head = before

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s/cp] (-100: ignored), logits [s/cp, b, V/tp] or hidden states -> the head's result.

        A head of multi-token prediction gets the plain NLL of its labels, a scorer's nothing but zeros: what Megatron
        makes of it is no part of the output.
        """
        self.loss_calls += 1
        is_mtp = self.loss_calls % (self.mtp_heads + 1) > 0
        if is_mtp and self.takes_hidden:
            return torch.zeros_like(labels, dtype=torch.float32)
        vocabulary = Vocabulary(
            weight=self.head_weight(),
            valid_vocab=self.valid_vocab,
            tp_group=self.pg_collection.tp,
            implementation=self.loss_implementation,
        )
        return (Logits() if is_mtp else self.head)(labels, logits, vocabulary)

    @property
    def calls_a_pass(self) -> int:
        """How often the hook is called in one pass of this chunk with labels."""
        return self.mtp_heads + 1 if self.post_process else 0


class RemitGPTModel(LossHook, GPTModel):
    """`GPTModel` whose loss is the NLL of each label; see `LossHook`."""


def hooked(model: GPTModel, **settings: Any) -> RemitGPTModel:
    """The GPTModel itself, which is a RemitGPTModel from here on: same parameters, same names in a checkpoint.

    settings: those of RemitGPTModel beside GPTModel's. A subclass of GPTModel keeps its own methods under the hook's.
    Raises UserError for a model of another kind.
    """
    become(model, RemitGPTModel)
    hook = cast("RemitGPTModel", model)
    _refuse(hook.config)
    hook.take_over_loss(**settings)
    return hook


def become(model: Any, kind: type[GPTModel]) -> None:
    """Give a built model another class, on top of the one it has. Raises UserError where it is no GPTModel."""
    found = type(model)
    if not isinstance(model, GPTModel):
        raise UserError(f"the model must be Megatron-Core's GPTModel, got {found.__name__}")
    model.__class__ = kind if issubclass(kind, found) else type(f"{kind.__name__}Of{found.__name__}", (kind, found), {})


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and Float16Module; where there is no LossHook, the innermost."""
    while not isinstance(model, LossHook) and hasattr(model, "module"):
        model = model.module
    return model


def _refuse(config: Any) -> None:
    """Raises UserError for what Megatron-Core, of any supported version, would train with another loss than ours."""
    for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        if getattr(config, name, 1) > 1:
            raise UserError(
                f"{name} = {getattr(config, name)} is not supported: its ranks have samples of their own, which the "
                "step's token count and batches leave out"
            )
    if getattr(config, "logit_dtype", None) is not None:
        raise UserError("logit_dtype is not supported: the loss takes logits as the head makes them; leave it unset")


def _refuse_for_sequence_chunks(config: Any, mtp_heads: int) -> None:
    """Raises UserError for what a gradient formed in forward cannot serve."""
    if mtp_heads:
        raise UserError("multi-token prediction (mtp_num_layers) has heads of its own: it needs loss_head = 'logits'")
    if config.fp16:
        raise UserError("loss_head = 'sequence_chunks' forms gradients before the loss is scaled: fp16 needs 'logits'")
    if config.defer_embedding_wgrad_compute:
        raise UserError("loss_head = 'sequence_chunks' cannot defer the head's gradient: defer_embedding_wgrad_compute")
