"""Passes of Megatron's schedule over a list of microbatches, for what a model says of them: no objective is needed.

They run in any layout and are collective over a model's ranks. Results are of this rank's positions, on the ranks of
the last pipeline stage; on other ranks they are an empty list.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from remit_megatron.data.deal import Deal
from remit_megatron.data.microbatch import LocalMicrobatch, Microbatch, Scores
from remit_megatron.errors import UserError
from remit_megatron.mcore.graph import Replayed
from remit_megatron.mcore.groups import Groups
from remit_megatron.mcore.heads import Distilling, HiddenStates
from remit_megatron.mcore.loss_hook import LossHook, unwrap
from remit_megatron.ops.choices import Compared
from remit_megatron.ops.distillation import Teacher
from remit_megatron.ops.distillation_entropy import entropy_and_top
from remit_megatron.ops.shard import IGNORED_LABEL
from remit_megatron.ops.top_tokens import TopTokens, summarise

Report = dict[str, Tensor]
"""A microbatch's metrics by name, [numerator, denominator] each."""
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Report]]
"""As Megatron's schedules take it: a model's output -> (loss sum, integer count of tokens, report)."""


@torch.no_grad()
def nll(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    *,
    merge: int = 1,
    graph: Replayed | None = None,
) -> list[Tensor]:
    """NLL [b, s/cp] float32 nats of each microbatch's labels under a rank's model chunks; 0 where masked.

    merge: how many microbatches go through the model in one pass. graph: replays the pass; without model parallelism
    and documents only.
    """
    return _outputs(chunks, microbatches, groups, merge, graph)


@torch.no_grad()
def hidden(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], groups: Groups, *, merge: int = 1
) -> list[Tensor]:
    """Inputs of a scorer's head, [b, s/cp, h] of the head's dtype, of each microbatch."""
    head = unwrap(chunks[-1])
    with head.using(HiddenStates()):
        found = _outputs(chunks, microbatches, groups, merge, None)
    return [one.to(head.head_weight().dtype) for one in found]


@torch.no_grad()
def nll_and_kl(
    chunks: Sequence[Any],
    reference: Sequence[Any],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    *,
    merge: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
) -> list[Tensor]:
    """[2, b, s/cp] float32 nats of each microbatch: NLL under a rank's model chunks, and their KL from a reference.

    chunks are of a model with whole logits, reference of a scorer; merge is the reference's, temperature and top_k as
    in `ops.distillation.Teacher`.
    """
    scored = list(microbatches)
    for i, states in enumerate(hidden(reference, microbatches, groups, merge=merge)):
        scored[i] = scored[i].with_scores(Scores(hidden=states))
    deal, results = groups.deal(), list[Tensor]()

    def step(iterator: Iterator[Microbatch], model: Any) -> tuple[Tensor, LossFunction]:
        microbatch, hook = next(iterator), checked(model, groups)
        local = microbatch.local(deal, hook.device_of_weights())
        if not hook.post_process:
            return run_model(local, model), _keep_in(results, local)
        teacher = teacher_of(reference, hook, local.scores, temperature=temperature, top_k=top_k)
        with hook.using(Distilling(teacher)):
            return run_model(local, model), _keep_in(results, local)

    run_schedule(step, scored, chunks, forward_only=True)
    return results


def teacher_of(
    reference: Sequence[Any],
    student: LossHook,
    scores: Scores | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    compare: Compared = "forward",
) -> Teacher:
    """The distribution of a reference of which `scores` has the hidden states, for `student` to be compared with over
    the rows that both have; reference: its chunks, on last-stage ranks. Collective over tensor parallelism."""
    assert scores is not None, "a distribution needs scores"
    assert scores.hidden is not None, "a distribution needs the reference's hidden states"
    head = unwrap(reference[-1])
    return Teacher(
        hidden=scores.hidden.transpose(0, 1),
        weight=head.head_rows(len(student.head_weight())),
        valid_vocab=min(head.valid_vocab, student.valid_vocab),
        temperature=temperature,
        chunk_tokens=head.head_chunk_tokens,
        top_k=top_k,
        compare=compare,
    )


def entropy_and_agreement(
    reference: Sequence[Any],
    hidden: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    common_vocab: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Of each microbatch, [b, s/cp] float32 each: the entropy of the reference's distribution at the temperature, nats,
    and 1 where its most probable token is the label.

    reference: its chunks, on last-stage ranks; hidden: what `hidden` makes of them; labels: [b, s/cp] int64.
    common_vocab: rows of the vocabulary that the distribution is over, from the first on; None: the reference's.
    """
    head, found = unwrap(reference[-1]), list[tuple[Tensor, Tensor]]()
    for states, wanted in zip(hidden, labels, strict=True):
        entropy, top = entropy_and_top(
            states.flatten(0, 1),
            head.head_weight(),
            temperature=temperature,
            valid_vocab=min(head.valid_vocab, common_vocab or head.valid_vocab),
            tp_group=head.pg_collection.tp,
            chunk_tokens=head.head_chunk_tokens,
        )
        found.append((entropy.view(wanted.shape), (top.view(wanted.shape) == wanted.to(top.device)).float()))
    return found


def summaries(
    reference: Sequence[Any],
    hidden: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    top_k: int,
    temperature: float = 1.0,
) -> list[Scores]:
    """Of each microbatch all that is kept of the reference's distributions in place of the hidden states: `top` with
    `top_k` tokens and `entropy` at the temperature, `agrees`, and `ref_nll` at temperature 1.

    reference, hidden: as of `entropy_and_agreement`; labels: [b, s/cp] int64, -100 where masked.
    """
    head, found = unwrap(reference[-1]), list[Scores]()
    for states, wanted in zip(hidden, labels, strict=True):
        b, s = wanted.shape
        # In the order in which the NLL's own head has the tokens, so that the bits are the same.
        kept = summarise(
            states.transpose(0, 1).flatten(0, 1),
            head.head_weight(),
            wanted.t().flatten(),
            top_k=top_k,
            temperature=temperature,
            valid_vocab=head.valid_vocab,
            tp_group=head.pg_collection.tp,
            chunk_tokens=head.head_chunk_tokens,
            implementation=head.loss_implementation,
        )
        ids, log_probs = (x.view(s, b, top_k).transpose(0, 1) for x in (kept.top.ids, kept.top.log_probs))
        nll, entropy, log_tail = (x.view(s, b).t() for x in (kept.nll, kept.entropy, kept.top.log_tail))
        top = TopTokens(ids=ids, log_probs=log_probs, log_tail=log_tail)
        found.append(Scores(ref_nll=nll, entropy=entropy, agrees=(ids[..., 0] == wanted).float(), top=top))
    return found


def run_schedule(
    forward_step: Callable[..., tuple[Tensor, LossFunction]],
    microbatches: Sequence[Microbatch],
    chunks: Sequence[Any],
    *,
    forward_only: bool,
) -> list[Report]:
    """One pass of Megatron's schedule over the microbatches; returns the last stage's reports, one a microbatch.

    Raises nothing of its own. Forward-only does not stop autograd: wrap it in torch.no_grad().
    """
    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=schedule_iterators(microbatches, chunks),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].length,
        micro_batch_size=microbatches[0].num_samples,
        forward_only=forward_only,
    )
    return reports


def schedule_iterators(microbatches: Sequence[Microbatch], chunks: Any) -> Any:
    """One iterator, or a list with one for each model chunk: an interleaved schedule reads every batch once a chunk."""
    if isinstance(chunks, list | tuple) and len(chunks) > 1:
        return [iter(microbatches) for _ in chunks]
    return iter(microbatches)


def run_model(local: LocalMicrobatch, model: Any, graph: Replayed | None = None) -> Tensor:
    """A model chunk's output for a microbatch: on the last stage what its head makes of the labels, on others what
    goes on to the next stage."""
    hook = unwrap(model)

    def run(tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        calls = hook.loss_calls
        output: Tensor = model(tokens, position_ids, local.documents, labels=labels)
        assert hook.loss_calls - calls == hook.calls_a_pass, "the loss hook must fire once a microbatch and head"
        return output

    masked = local.labels.masked_fill(local.loss_mask == 0, IGNORED_LABEL)
    inputs = {"tokens": local.tokens, "position_ids": local.position_ids, "labels": masked}
    if graph is None:
        return run(**inputs)
    assert local.documents is None, "a graph does not see the documents of a later batch"
    return graph(run, inputs)


def checked(model: Any, groups: Groups) -> LossHook:
    """The model in a chunk. Raises UserError where Megatron would accept it and compute wrongly."""
    hook = unwrap(model)
    if not isinstance(hook, LossHook):
        raise UserError(f"the model must be a remit_megatron.mcore.RemitGPTModel, got {type(hook).__name__}")
    config = hook.config
    if not config.calculate_per_token_loss:
        raise UserError(
            "TransformerConfig.calculate_per_token_loss must be True: the other normalisation is inexact with "
            "ragged loss masks and with context parallelism"
        )
    if groups.pp.size() == 2 and config.virtual_pipeline_model_parallel_size and config.batch_p2p_comm:
        raise UserError(
            "pipeline 2 with virtual stages needs overlap_p2p_comm=True and batch_p2p_comm=False: batched p2p "
            "mixes activations and gradients silently"
        )
    return hook


def _outputs(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], groups: Groups, merge: int, graph: Replayed | None
) -> list[Tensor]:
    """The last stage's outputs as float32, one a microbatch."""
    parts = [Microbatch.concatenate(microbatches[i : i + merge]) for i in range(0, len(microbatches), merge)]
    if len({part.num_samples for part in parts}) > 1:  # p2p shapes are fixed within one schedule run
        parts = list(microbatches)
    results: list[Tensor] = []
    run_schedule(
        functools.partial(_output_step, results, groups, groups.deal(), graph), parts, chunks, forward_only=True
    )
    if not groups.is_last_stage:
        return []
    return list(torch.cat(results).split([one.num_samples for one in microbatches]))


def _output_step(
    results: list[Tensor],
    groups: Groups,
    deal: Deal,
    graph: Replayed | None,
    iterator: Iterator[Microbatch],
    model: Any,
) -> tuple[Tensor, LossFunction]:
    microbatch, hook = next(iterator), checked(model, groups)
    local = microbatch.local(deal, hook.device_of_weights())
    return run_model(local, model, graph), _keep_in(results, local)


def _keep_in(results: list[Tensor], local: LocalMicrobatch) -> LossFunction:
    """A schedule's loss function for passes whose outputs are what is wanted: it adds them to `results`."""

    def keep(output: Tensor) -> tuple[Tensor, Tensor, Report]:
        results.append(output.detach().float())
        return output.sum(), local.loss_mask.sum().int(), {}

    return keep
