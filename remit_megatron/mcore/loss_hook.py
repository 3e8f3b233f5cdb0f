"""The hook into Megatron-Core's loss path: a GPTModel whose loss is the sharded token NLL of this package.

Megatron's own cross-entropy is left untouched and unused: it writes into float32 logits, lets padded columns into the
softmax and gives masked labels a gradient. `compute_language_model_loss` is the one method every Megatron language
model calls with the labels and the sharded logits, so overriding it in a subclass reaches its caller in every version;
patching the symbol it uses would not reach callers that imported it earlier.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.collectives import sum_gradients
from remit_megatron.ops.distillation import Teacher, nll_and_kl
from remit_megatron.ops.linear_loss import SequenceLoss, linear_loss_by_sequence
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll


class RemitGPTModel(GPTModel):
    """`GPTModel` that returns the NLL of each label, [b, s/cp] float32 in nats, when called with labels.

    Takes GPTModel's arguments and:
      valid_vocab: rows of the vocabulary without padding; default: all rows of `vocab_size`. Columns past it are not
        in the softmax and get no gradient.
      scorer: a frozen model that only ever yields NLL. Its head computes logits for `head_chunk_tokens` tokens at a
        time and never holds more; it cannot return logits.
      loss_head: "logits", or "sequence_chunks": the head's logits then exist for one sample at a time, and turn into
        gradients before the next sample's are formed. A training forward needs the loss for that: it runs inside
        `loss_by_sequence`, and returns the loss sum in place of the NLL. It cannot return logits either.
      loss_implementation: as in `token_nll`.

    `loss_calls` counts the hook's calls, by which a trainer proves that the loss it reports is the one it trains on.
    """

    def __init__(
        self,
        *args: Any,
        valid_vocab: int | None = None,
        scorer: bool = False,
        head_chunk_tokens: int = 2048,
        loss_head: str = "logits",
        loss_implementation: str = "auto",
        **kwargs: Any,
    ):
        assert loss_head in ("logits", "sequence_chunks"), f"unknown loss_head '{loss_head}'"
        super().__init__(*args, **kwargs)
        if getattr(self.config, "mtp_num_layers", None):
            raise UserError("multi-token prediction (mtp_num_layers) is not supported: its heads share the loss hook")
        if getattr(self.config, "num_moe_experts", None):
            raise UserError(
                "mixture of experts (num_moe_experts) is not supported: its auxiliary losses are untested here"
            )
        self.valid_vocab = self.vocab_size if valid_vocab is None else valid_vocab
        self.head_chunk_tokens = head_chunk_tokens
        self.loss_implementation = loss_implementation
        self.loss_calls = 0
        self.scorer = scorer
        self.loss_head = "logits" if scorer else loss_head
        self._loss_of_sequence: SequenceLoss | None = None
        self._teacher: Teacher | None = None
        self._yields_hidden = False
        if self.loss_head == "sequence_chunks":
            _refuse_for_sequence_chunks(self.config)
        if self.post_process and (scorer or self.loss_head == "sequence_chunks"):
            # Same parameters, another forward; so checkpoints and tied weights stay Megatron's.
            self.output_layer.__class__ = _HiddenHead
        if scorer:
            self.eval().requires_grad_(False)

    def device_of_weights(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "RemitGPTModel":
        return super().train(mode and not self.scorer)

    def head_weight(self) -> Tensor:
        """The head's rows on this rank, [V/tp, h]; the embedding's where they are tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    @contextlib.contextmanager
    def loss_by_sequence(self, loss_of_sequence: SequenceLoss) -> Iterator[None]:
        """With loss_head = "sequence_chunks": calls with labels return the sum of this loss over the samples.

        loss_of_sequence: (sample i, its NLL [1, s/cp]) -> that sample's loss sum; called once a sample, in order.
        """
        assert self.loss_head == "sequence_chunks", f"a loss by sequence with loss_head '{self.loss_head}'"
        self._loss_of_sequence = loss_of_sequence
        try:
            yield
        finally:
            self._loss_of_sequence = None

    @contextlib.contextmanager
    def distilled_from(self, teacher: Teacher) -> Iterator[None]:
        """Calls with labels return [2, b, s/cp] float32: the NLL, and the KL from the teacher's distribution."""
        assert not isinstance(self.output_layer, _HiddenHead), "distillation needs the student's logits"
        self._teacher = teacher
        try:
            yield
        finally:
            self._teacher = None

    @contextlib.contextmanager
    def hidden_states(self) -> Iterator[None]:
        """Calls of a scorer with labels return the inputs of its head, [b, s/cp, h], whole on each rank."""
        assert self.scorer, "hidden states are a scorer's"
        self._yields_hidden = True
        try:
            yield
        finally:
            self._yields_hidden = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s/cp] (-100: ignored), logits [s/cp, b, V/tp] -> NLL [b, s/cp] float32; 0 where ignored.

        Where the head hands hidden states on, they take the place of the logits, [s/cp, b, h]. Inside
        `loss_by_sequence` the result is the loss sum, a float32 scalar; `distilled_from` and `hidden_states` say what
        it is inside them.
        """
        self.loss_calls += 1
        if self._yields_hidden:
            return logits.transpose(0, 1)
        settings: Any = {
            "valid_vocab": self.valid_vocab,
            "tp_group": self.pg_collection.tp,
            "implementation": self.loss_implementation,
        }
        if self._loss_of_sequence is not None:
            loss = self._loss_of_sequence
            return linear_loss_by_sequence(logits, self.head_weight(), labels, loss, **settings)[0]
        labels = labels.transpose(0, 1)
        if self._teacher is not None:
            vocabulary: Any = {"valid_vocab": self.valid_vocab, "tp_group": self.pg_collection.tp}
            return nll_and_kl(logits, labels, self._teacher, **vocabulary).transpose(1, 2)
        if not isinstance(self.output_layer, _HiddenHead):
            return token_nll(logits, labels, **settings).transpose(0, 1)
        if torch.is_grad_enabled() and logits.requires_grad:
            raise UserError(
                "loss_head = 'sequence_chunks' trains inside RemitGPTModel.loss_by_sequence only, as the step of "
                "make_forward_step does: the NLL alone has no gradient here"
            )
        hidden, chunk = logits.flatten(0, 1), self.head_chunk_tokens
        nll = linear_nll(hidden, self.head_weight(), labels.flatten(), chunk_tokens=chunk, **settings)
        return nll.view(labels.shape).transpose(0, 1)


class _HiddenHead(ColumnParallelLinear):
    """A head that hands the final hidden states on, [s/cp, b, h], for the loss to apply the weight.

    Their gradient, each rank's part where the vocabulary is sharded, is summed over tensor-parallel ranks in backward.
    """

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return sum_gradients(input_, self.tp_group), None


def _refuse_for_sequence_chunks(config: Any) -> None:
    """Raises UserError for what a gradient formed in forward cannot serve."""
    if config.fp16:
        raise UserError("loss_head = 'sequence_chunks' forms gradients before the loss is scaled: fp16 needs 'logits'")
    if config.defer_embedding_wgrad_compute:
        raise UserError("loss_head = 'sequence_chunks' cannot defer the head's gradient: defer_embedding_wgrad_compute")


def loss_calls(chunks: list[Any]) -> int:
    """Calls of the hook so far, over a rank's model chunks (wrapped in DDP, Float16Module, or bare)."""
    total = 0
    for chunk in chunks:
        while not isinstance(chunk, RemitGPTModel):
            chunk = chunk.module
        total += chunk.loss_calls
    return total
