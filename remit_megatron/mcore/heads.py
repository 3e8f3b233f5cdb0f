"""What a model's head makes of labels: five kinds of result, each an object that a model calls once a microbatch.

Letters in shapes: s/cp positions of this rank, b samples, V/tp columns of the vocabulary on this rank, h hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.collectives import sum_gradients
from remit_megatron.ops.distillation import Teacher, nll_and_kl
from remit_megatron.ops.distillation_kept import KeptTeacher, nll_and_kept_kl
from remit_megatron.ops.implementation import Implementation
from remit_megatron.ops.linear_loss import SequenceLoss, linear_loss_by_sequence
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A model's rows of the vocabulary on this rank, as its head sees them."""

    weight: Tensor
    """[V/tp, h]: the head's rows; the embedding's where they are tied."""
    valid_vocab: int
    """Rows of all ranks without padding."""
    tp_group: dist.ProcessGroup
    implementation: Implementation
    """Of the token NLL."""


class LossHead(Protocol):
    """Turns what the output layer hands on into the result of a call with labels."""

    takes_hidden: ClassVar[bool]
    """True: the head takes hidden states [s/cp, b, h], from an output layer that is a `HiddenLayer`. False: it takes
    logits [s/cp, b, V/tp]."""

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        """labels [b, s/cp] int64, -100 where ignored; x as `takes_hidden` says."""
        ...


@dataclass(frozen=True, slots=True)
class Logits:
    """The NLL of each label [b, s/cp] float32 nats, 0 where ignored, differentiable in whole logits."""

    takes_hidden: ClassVar[bool] = False

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        nll = token_nll(
            x,
            labels.transpose(0, 1),
            valid_vocab=vocabulary.valid_vocab,
            tp_group=vocabulary.tp_group,
            implementation=vocabulary.implementation,
        )
        return nll.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Chunked:
    """The NLL of each label [b, s/cp] float32 nats, without gradient: logits exist for `chunk_tokens` at one time."""

    chunk_tokens: int

    takes_hidden: ClassVar[bool] = True

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Raises UserError where a gradient would be lost."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(
                "loss_head = 'sequence_chunks' trains inside RemitGPTModel.using(BySequence(...)) only, as the step of "
                "make_forward_step does: the NLL alone has no gradient here"
            )
        labels = labels.transpose(0, 1)
        nll = linear_nll(
            x.flatten(0, 1),
            vocabulary.weight,
            labels.flatten(),
            chunk_tokens=self.chunk_tokens,
            valid_vocab=vocabulary.valid_vocab,
            tp_group=vocabulary.tp_group,
            implementation=vocabulary.implementation,
        )
        return nll.view(labels.shape).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class BySequence:
    """The sum of a loss over the samples, a float32 scalar: logits exist for one sample at a time, and turn into
    gradients before the next sample's are formed."""

    loss_of_sequence: SequenceLoss
    """(sample i, its NLL [1, s/cp]) -> that sample's loss sum; called once a sample, in order."""

    takes_hidden: ClassVar[bool] = True

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        return linear_loss_by_sequence(
            x,
            vocabulary.weight,
            labels,
            self.loss_of_sequence,
            valid_vocab=vocabulary.valid_vocab,
            tp_group=vocabulary.tp_group,
            implementation=vocabulary.implementation,
        )[0]


@dataclass(frozen=True, slots=True)
class Distilling:
    """[2, b, s/cp] float32 nats, differentiable in whole logits: the NLL, and the comparison with a teacher's
    distribution."""

    teacher: Teacher | KeptTeacher
    compared: Tensor | None = None
    """[b, s/cp] bool: the tokens whose comparison is wanted; it is 0 elsewhere. None: all."""

    takes_hidden: ClassVar[bool] = False

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        labels, rows, group = labels.transpose(0, 1), vocabulary.valid_vocab, vocabulary.tp_group
        compared = None if self.compared is None else self.compared.transpose(0, 1)
        if isinstance(self.teacher, KeptTeacher):
            both = nll_and_kept_kl(x, labels, self.teacher, compared=compared, valid_vocab=rows, tp_group=group)
        else:
            both = nll_and_kl(x, labels, self.teacher, compared=compared, valid_vocab=rows, tp_group=group)
        return both.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The inputs of the output layer, [b, s/cp, h], whole on each tensor-parallel rank."""

    takes_hidden: ClassVar[bool] = True

    def __call__(self, labels: Tensor, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        return x.transpose(0, 1)


class HiddenLayer(ColumnParallelLinear):
    """An output layer that hands the final hidden states on, [s/cp, b, h], for the loss to apply the weight.

    Their gradient, each rank's part where the vocabulary is sharded, is summed over tensor-parallel ranks in backward.
    """

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return sum_gradients(input_, self.tp_group), None
