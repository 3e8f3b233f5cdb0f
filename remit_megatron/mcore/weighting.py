"""A built GPTModel that weights its own loss, so that a script with its own batches and loss function stays as it is.

In training the model returns w * nll for each label, in evaluation nll; the script's loss function multiplies by its
mask, adds up and counts, as Megatron-LM's does, and so computes the objective's loss. The frozen reference runs inside
the model's forward, on the very inputs that the model was given: context-parallel slices, attention masks and all.
That needs the whole reference on each rank, and so no pipelining; `make_forward_step` has no such limit.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.groups import current_groups
from remit_megatron.mcore.loss_hook import RemitGPTModel, become, hooked, unwrap
from remit_megatron.objectives import LossSum, Need, Objective, Ratio, TokenStats
from remit_megatron.objectives.settings import RemitSettings
from remit_megatron.ops.shard import IGNORED_LABEL

PIPELINED = "examples/megatron_lm/pretrain_remit.py, or make_forward_step in a loop of your own, does that"


class WeightingGPTModel(RemitGPTModel):
    """Returns w * nll [b, s/cp] float32 nats in training and nll in evaluation; 0 where masked. See `adopt`."""

    objective: Objective
    references: tuple[Any, ...]
    """The frozen reference, or nothing; in a tuple, so that it is no submodule and no checkpoint or optimizer sees it.
    """
    metrics: dict[str, Ratio]
    """The objective's, of this rank's tokens since they were last taken; see `take_metrics`."""
    is_checked: bool
    """Whether the objective was found to be a weighting of tokens."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As GPTModel's. Training needs `labels` and `loss_mask` by name, [b, s/cp] each, as Megatron-LM gives them."""
        labels, loss_mask = kwargs.get("labels"), kwargs.get("loss_mask")
        if labels is None:
            return cast("Tensor", super().forward(input_ids, position_ids, attention_mask, *args, **kwargs))
        if kwargs.get("packed_seq_params") is not None:
            raise UserError("ReMiT does not read packed_seq_params: weights are centred over a sample of [b, s]")
        if self.training and loss_mask is None:
            raise UserError("the forward step must give the model its loss_mask, as Megatron-LM's does")
        if loss_mask is not None:
            # Of a masked label nothing may reach the sum: 0 * inf is nan.
            kwargs["labels"] = labels.masked_fill(loss_mask == 0, IGNORED_LABEL)
        nll: Tensor = super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)
        if not self.training or not torch.is_grad_enabled():
            return nll
        ref_nll = None
        if self.references:
            with torch.no_grad():
                ref_nll = self.references[0](input_ids, position_ids, attention_mask, labels=kwargs["labels"])
        return nll * self.weights(nll.detach(), ref_nll, cast("Tensor", loss_mask).float())

    def weights(self, nll: Tensor, ref_nll: Tensor | None, mask: Tensor) -> Tensor:
        """What each NLL counts for, [b, s/cp] float32: the gradient of the objective's sum. Adds to `metrics`."""
        with torch.enable_grad():
            leaf = nll.clone().requires_grad_()
            out = self.objective(TokenStats(nll=leaf, ref_nll=ref_nll, mask=mask, cp_group=current_groups().cp))
            weights: Tensor = torch.autograd.grad(out.loss_sum, leaf)[0]
        if not self.is_checked:
            _check_weighting(self.objective.name, out, weights, nll, mask)
            self.is_checked = True
        for name, ratio in out.metrics.items():
            self.metrics[name] = self.metrics[name] + ratio if name in self.metrics else ratio
        return weights

    def take_metrics(self) -> dict[str, float]:
        """The objective's metrics over all ranks since the last call, `nll` the plain one. Collective, waits."""
        found: dict[str, float] = {}
        for name, ratio in self.metrics.items():
            both = torch.stack([ratio.num, ratio.den])
            dist.all_reduce(both, group=current_groups().dp_cp)
            found[name] = Ratio(both[0], both[1]).read()
        self.metrics = {}
        return found


def adopt(
    model: GPTModel, objective: Objective, reference: Any = None, *, valid_vocab: int | None = None
) -> WeightingGPTModel:
    """Turn a built GPTModel, before it is wrapped, into one that weights its own loss. Returns the same model.

    objective: one whose loss is a sum of weighted NLL over the unmasked tokens, as `ntp` and `remit` are. reference:
    the frozen model with its weights, in the student's own groups: a RemitGPTModel built with `scorer=True`, or a
    GPTModel, which becomes one; it may be in Float16Module. valid_vocab: rows of the vocabulary without padding.
    The config must have calculate_per_token_loss (Megatron-LM: --calculate-per-token-loss).
    Raises UserError for pipelining, and for an objective that needs more than the reference's NLL.
    """
    config = model.config
    if config.pipeline_model_parallel_size > 1 or not (model.pre_process and model.post_process):
        raise UserError(f"a model that weights its own loss cannot be pipelined: {PIPELINED}")
    if not config.calculate_per_token_loss:
        raise UserError(
            "calculate_per_token_loss must be set (--calculate-per-token-loss): the other normalisation is inexact "
            "with ragged loss masks and with context parallelism"
        )
    _check_objective(objective, reference)
    hook = model if isinstance(model, RemitGPTModel) else hooked(model, valid_vocab=valid_vocab)
    if hook.takes_hidden:
        raise UserError("a model that weights its own loss needs whole logits: loss_head = 'logits' and no scorer")
    references = () if reference is None else (_frozen(reference, hook.valid_vocab),)
    become(hook, WeightingGPTModel)
    adopted = cast("WeightingGPTModel", hook)
    adopted.objective, adopted.references = objective, references
    adopted.metrics, adopted.is_checked = {}, False
    return adopted


def pre_wrap_hook(
    objective: Objective, reference: Callable[[GPTModel], Any] | None = None, *, valid_vocab: int | None = None
) -> Callable[[list[Any]], list[Any]]:
    """`adopt` in the form that Megatron-LM's model configs and Megatron-Bridge's providers take.

    reference: called with the student once it is built, for instance with its config to build another; returns what
    `adopt` takes.
    """

    def hook(chunks: list[Any]) -> list[Any]:
        if len(chunks) != 1:
            raise UserError(f"a model that weights its own loss cannot be pipelined: {PIPELINED}")
        student = chunks[0]
        found = None if reference is None else reference(student)
        return [adopt(student, objective, found, valid_vocab=valid_vocab)]

    return hook


def _check_objective(objective: Objective, reference: Any) -> None:
    if more := objective.needs - {Need.REF_NLL}:
        raise UserError(
            f"objective '{objective.name}' needs {', '.join(sorted(need.value for need in more))}, which a model that "
            f"weights its own loss does not have: {PIPELINED}"
        )
    if isinstance(objective, RemitSettings) and objective.shuffle:
        raise UserError(f"objective.shuffle needs the samples' numbers, which the model is not given: {PIPELINED}")
    if Need.REF_NLL in objective.needs and reference is None:
        raise UserError(f"objective '{objective.name}' needs a reference")


def _frozen(reference: Any, valid_vocab: int) -> Any:
    """The reference as it is called, a scorer inside."""
    inner = unwrap(reference)
    if not isinstance(inner, RemitGPTModel):
        hooked(inner, scorer=True, valid_vocab=min(valid_vocab, inner.vocab_size))
    elif not inner.scorer:
        raise UserError("the reference must be a RemitGPTModel built with scorer=True, or a GPTModel")
    inner = unwrap(reference)
    if inner.valid_vocab < valid_vocab:
        raise UserError(f"the reference has {inner.valid_vocab} rows of the vocabulary, the model {valid_vocab}")
    reference.eval().requires_grad_(False)
    return reference


def _check_weighting(name: str, out: LossSum, weights: Tensor, nll: Tensor, mask: Tensor) -> None:
    """Raises UserError unless the script's own loss function computes the objective's loss. Waits for the device."""
    kept = mask > 0
    tokens, counted = int(kept.sum()), int(out.num_tokens)
    if tokens != counted:
        raise UserError(
            f"objective '{name}' divides by the {counted} tokens that it selects, and the script's loss function by "
            f"all {tokens} unmasked ones: {PIPELINED}"
        )
    wanted, found = float(out.loss_sum), float((weights * nll).where(kept, 0.0).double().sum())
    if abs(found - wanted) > 1e-4 * max(1.0, abs(wanted)):
        raise UserError(f"objective '{name}' is no weighted sum of NLL: {PIPELINED}")
