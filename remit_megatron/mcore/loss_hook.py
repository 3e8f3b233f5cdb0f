"""The hook into Megatron-Core's loss path: a language model whose loss is the sharded token NLL of this package.

Megatron's own cross-entropy is left untouched and unused: it writes into float32 logits, lets padded columns into the
softmax and gives masked labels a gradient. `compute_language_model_loss` is the one method every Megatron language
model calls with the labels and the sharded logits, so overriding it in a subclass reaches its caller in every version;
patching the symbol it uses would not reach callers that imported it earlier.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore import compat
from remit_megatron.mcore.heads import Chunked, HiddenLayer, Logits, LossHead, Vocabulary
from remit_megatron.ops.implementation import Implementation


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
        assert loss_head in ("logits", "sequence_chunks"), f"unknown loss_head '{loss_head}'"
        compat.silence_deprecation()
        _refuse(args[0] if args else kwargs["config"])
        super().__init__(*args, **kwargs)
        self.valid_vocab: int = self.vocab_size if valid_vocab is None else valid_vocab
        self.head_chunk_tokens = head_chunk_tokens
        self.loss_implementation: Implementation = loss_implementation
        self.loss_calls = 0
        self.scorer = scorer
        self.by_sequence = loss_head == "sequence_chunks" and not scorer
        """Whether a training forward needs the loss of a sequence."""
        if self.by_sequence:
            _refuse_for_sequence_chunks(self.config)
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
        """labels [b, s/cp] (-100: ignored), logits [s/cp, b, V/tp] or hidden states -> the head's result."""
        self.loss_calls += 1
        vocabulary = Vocabulary(
            weight=self.head_weight(),
            valid_vocab=self.valid_vocab,
            tp_group=self.pg_collection.tp,
            implementation=self.loss_implementation,
        )
        return self.head(labels, logits, vocabulary)


class RemitGPTModel(LossHook, GPTModel):
    """`GPTModel` whose loss is the NLL of each label; see `LossHook`."""


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and Float16Module; where there is no LossHook, the innermost."""
    while not isinstance(model, LossHook) and hasattr(model, "module"):
        model = model.module
    return model


def _refuse(config: Any) -> None:
    """Raises UserError for what Megatron-Core, of any supported version, would train with another loss than ours."""
    if getattr(config, "mtp_num_layers", None):
        raise UserError("multi-token prediction (mtp_num_layers) is not supported: its heads share the loss hook")
    if getattr(config, "num_moe_experts", None):
        raise UserError("mixture of experts (num_moe_experts) is not supported: its auxiliary losses are untested here")
    for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        if getattr(config, name, 1) > 1:
            raise UserError(
                f"{name} = {getattr(config, name)} is not supported: its ranks have samples of their own, which the "
                "step's token count and batches leave out"
            )
    if getattr(config, "logit_dtype", None) is not None:
        raise UserError("logit_dtype is not supported: the loss takes logits as the head makes them; leave it unset")


def _refuse_for_sequence_chunks(config: Any) -> None:
    """Raises UserError for what a gradient formed in forward cannot serve."""
    if config.fp16:
        raise UserError("loss_head = 'sequence_chunks' forms gradients before the loss is scaled: fp16 needs 'logits'")
    if config.defer_embedding_wgrad_compute:
        raise UserError("loss_head = 'sequence_chunks' cannot defer the head's gradient: defer_embedding_wgrad_compute")
