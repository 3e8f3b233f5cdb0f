"""The hook into Megatron-Core's loss path: a GPTModel whose loss is the sharded token NLL of this package.

Megatron's own cross-entropy is left untouched and unused: it writes into float32 logits, lets padded columns into the
softmax and gives masked labels a gradient. `compute_language_model_loss` is the one method every Megatron language
model calls with the labels and the sharded logits, so overriding it in a subclass reaches its caller in every version;
patching the symbol it uses would not reach callers that imported it earlier.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll


class RemitGPTModel(GPTModel):
    """`GPTModel` that returns the NLL of each label, [b, s/cp] float32 in nats, when called with labels.

    Takes GPTModel's arguments and:
      valid_vocab: rows of the vocabulary without padding; default: all rows of `vocab_size`. Columns past it are not
        in the softmax and get no gradient.
      scorer: a frozen model that only ever yields NLL. Its head computes logits for `head_chunk_tokens` tokens at a
        time and never holds more; it cannot return logits.
      loss_implementation: as in `token_nll`.

    `loss_calls` counts the hook's calls, by which a trainer proves that the loss it reports is the one it trains on.
    """

    def __init__(
        self,
        *args: Any,
        valid_vocab: int | None = None,
        scorer: bool = False,
        head_chunk_tokens: int = 2048,
        loss_implementation: str = "auto",
        **kwargs: Any,
    ):
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
        if scorer and self.post_process:
            # Same parameters, another forward; so checkpoints and tied weights stay Megatron's.
            self.output_layer.__class__ = _ScoringHead
        if scorer:
            self.eval().requires_grad_(False)

    def device_of_weights(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "RemitGPTModel":
        return super().train(mode and not self.scorer)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s/cp] (-100: ignored), logits [s/cp, b, V/tp] -> NLL [b, s/cp] float32; 0 where ignored."""
        self.loss_calls += 1
        labels = labels.transpose(0, 1)
        if not self.scorer:
            nll = token_nll(
                logits,
                labels,
                valid_vocab=self.valid_vocab,
                tp_group=self.pg_collection.tp,
                implementation=self.loss_implementation,
            )
            return nll.transpose(0, 1)
        hidden, weight = logits, self.output_layer.scoring_weight
        nll = linear_nll(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            valid_vocab=self.valid_vocab,
            tp_group=self.pg_collection.tp,
            chunk_tokens=self.head_chunk_tokens,
            implementation=self.loss_implementation,
        )
        return nll.view(labels.shape).transpose(0, 1)


class _ScoringHead(ColumnParallelLinear):
    """A head that hands the final hidden states on, [s/cp, b, h], and keeps its weight for `linear_nll`."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        self.scoring_weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return input_, None


def loss_calls(chunks: list[Any]) -> int:
    """Calls of the hook so far, over a rank's model chunks (wrapped in DDP, Float16Module, or bare)."""
    total = 0
    for chunk in chunks:
        while not isinstance(chunk, RemitGPTModel):
            chunk = chunk.module
        total += chunk.loss_calls
    return total
