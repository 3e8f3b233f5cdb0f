"""ReMiT's step inside `megatron.training.pretrain`: the reference's pass before the schedule, and the loss it reports.

`pretrain` has no place for work before a step's schedule, and its batches exist on the ends of a pipeline only, cut for
context parallelism already. Both are met at one seam, the same from 0.16 to 0.20: its training loop and its evaluation
ask `get_forward_backward_func`, a name of their own module, for the schedule. What they get here reads the step's
microbatches whole on every rank, lets the reference score them, and calls Megatron's schedule with them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_tokenizer

from remit_megatron import toml
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.errors import UserError
from remit_megatron.mcore.megatron_lm.checkpoint import FLAG
from remit_megatron.mcore.megatron_lm.reference import Builder, load_reference
from remit_megatron.mcore.passes import LossFunction, Report
from remit_megatron.mcore.step import ForwardStep, make_forward_step
from remit_megatron.objectives import Objective, build_objective

stimer = StragglerDetector()


class Steps:
    """The forward steps of training and of evaluation, with the reference that they need. Made after the groups."""

    def __init__(self, build: Builder):
        arguments = get_args()
        objective = objective_of(arguments)
        reference = None
        if objective.needs_reference:
            reference = load_reference(build, arguments.remit_reference, valid_vocab(arguments))
        length = arguments.seq_length
        self.train = make_forward_step(objective, reference, sequence_length=length)
        self.evaluate = make_forward_step(build_objective({"name": "ntp"}), sequence_length=length)

    def run(self, schedule: Callable[..., Any], **kwargs: Any) -> Any:
        """One pass of Megatron's schedule, called as `pretrain` calls it: for an update, or for evaluation."""
        arguments, count = get_args(), kwargs["num_microbatches"]
        step = self.evaluate if kwargs["forward_only"] else self.train
        step.step = 0 if kwargs["forward_only"] else arguments.curr_iteration + 1
        given = kwargs["data_iterator"]
        source = given[0] if isinstance(given, list) else given  # with virtual stages one for each, of the same samples
        with stimer(bdata=True):
            batches = (read_microbatch(source, number) for number in itertools.count())
            kwargs["data_iterator"] = step.prepare(batches, count, kwargs["model"])
        kwargs["forward_step_func"] = functools.partial(_forward_step, step)
        return schedule(**kwargs)


def install(build: Builder) -> None:
    """Put the steps into Megatron-LM's training loop; they are made when it first asks for a schedule."""
    from megatron.training import training

    schedule_of = training.get_forward_backward_func
    steps: list[Steps] = []

    def with_reference(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        if not steps:
            steps.append(Steps(build))
        return functools.partial(steps[0].run, schedule_of(*args, **kwargs))

    training.get_forward_backward_func = with_reference


def objective_of(arguments: Any) -> Objective:
    """The objective of --remit-objective and --remit-set. Raises UserError for settings that do not fit."""
    settings: dict[str, Any] = {"name": arguments.remit_objective}
    for assignment in arguments.remit_set:
        try:
            toml.override(settings, assignment)
        except UserError as error:
            raise UserError(str(error).replace("--set", "--remit-set")) from None
    objective = build_objective(settings)
    if objective.needs_reference and not arguments.remit_reference:
        raise UserError(f"--remit-objective {arguments.remit_objective} needs {FLAG} CHECKPOINT")
    return objective


def valid_vocab(arguments: Any) -> int:
    """Rows of the vocabulary that the softmax runs over."""
    rows = arguments.remit_valid_vocab or get_tokenizer().vocab_size
    if rows > arguments.padded_vocab_size:
        raise UserError(f"--remit-valid-vocab {rows}: the model has {arguments.padded_vocab_size} rows")
    return int(rows)


def read_microbatch(iterator: Iterator[Any] | None, number: int) -> Microbatch:
    """Whole samples on every rank of a model, from the first tensor-parallel rank of its stage, which has the dataset.

    number: of the microbatch within the step. Documents end at the tokenizer's end-of-document token.
    """
    data = None if iterator is None else next(iterator)
    batch = tensor_parallel.broadcast_data(["tokens", "labels"], data, torch.int64)
    mask = tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)["loss_mask"]
    tokens = batch["tokens"]
    ends = tokens == get_tokenizer().eod
    ranks, arguments = mpu.get_data_parallel_world_size(), get_args()
    first = arguments.consumed_train_samples + (number * ranks + mpu.get_data_parallel_rank()) * len(tokens)
    return Microbatch(
        tokens=tokens,
        labels=batch["labels"],
        loss_mask=mask,
        # The label after an end belongs to the next document; a sample's first label to document 0.
        segment_ids=ends.long().cumsum(1) - ends[:, :1].long(),
        sample_id=torch.arange(first, first + len(tokens), device=tokens.device),
    )


def _forward_step(step: ForwardStep, data_iterator: Any, model: Any) -> tuple[torch.Tensor, LossFunction]:
    with stimer:
        output, loss = step(data_iterator, model)
    return output, functools.partial(_checked, loss)


def _checked(loss_func: LossFunction, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """With Megatron-LM's checks of each loss, and its name for the plain NLL."""
    loss, tokens, report = loss_func(output)
    if get_args().check_for_nan_in_loss_and_grad:
        for what in (torch.isnan, torch.isinf):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=what,
                message=f"found {what.__name__.removeprefix('is')} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    named = {"lm loss": report.pop("nll")}
    if len(report) > 1:  # of an objective other than NTP, whose loss is the NLL
        named |= {f"remit {name}": value for name, value in report.items()}
    return loss, tokens, {name: value.float() for name, value in named.items()}
