"""A GPTModel that weights its own loss trains as RemitGPTModel under this package's own forward step does.

The adopted model is Megatron-Core's GPTModel, called and summed as Megatron-LM's pretrain_gpt.py does it. Both run the
same operations in the same order but for the product w * nll, which autograd takes on one side as a sum's and on the
other as the mask's: tolerance is float32 round-off, 1e-6 of the largest gradient of each parameter.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import BUILD, MICROBATCH, SEQUENCE, STUDENT, global_batches, local_microbatches, randomise
from tests.ranks import run_ranks

LAYOUTS = {"TP2": {"tensor": 2}, "CP2": {"context": 2}, "DP2": {}}
SETTINGS: list[dict[str, Any]] = [{"name": "remit"}, {"name": "remit", "clip": False}, {"name": "ntp"}]
SMALL = STUDENT.model_copy(update={"num_layers": 2})
REFERENCE = SMALL.model_copy(update={"hidden_size": 24, "kv_channels": 6, "num_layers": 3})


def built(shape: Any, parallel: Parallel, seed: int, *, plain: bool, scorer: bool = False) -> Any:
    """A model with the same weights whether it is built as GPTModel or as RemitGPTModel."""
    from megatron.core.models.gpt import GPTModel

    from remit_megatron.mcore import model as models

    (chunk,), config = models.build_chunks(shape, parallel, BUILD, max_sequence_length=SEQUENCE, scorer=scorer)
    randomise([chunk])
    for parameter in chunk.parameters():
        parameter.data.mul_(1 + 0.1 * seed)
    if not plain:
        return chunk
    model = GPTModel(
        config,
        models._block_spec(shape, config, "local", None),
        shape.padded_vocab(parallel.tensor),
        SEQUENCE,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    model.load_state_dict(chunk.state_dict())
    return model


def script_step(deal: Any, iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    """pretrain_gpt.py's forward step and loss function, in short."""
    from remit_megatron.mcore.loss_hook import unwrap

    local = next(iterator).local(deal, BUILD.device)

    def loss_func(mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss = torch.sum(output.view(-1).float() * mask.view(-1).float())
        num_tokens = mask.sum().clone().detach().to(torch.int)
        return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens])}

    assert unwrap(model).post_process
    output = model(
        local.tokens, local.position_ids, None, labels=local.labels, loss_mask=local.loss_mask, packed_seq_params=None
    )
    return output, partial(loss_func, local.loss_mask)


def trained(settings: dict[str, Any], parallel: Parallel, *, adopted: bool) -> dict[str, Any]:
    """Loss and plain NLL of a step and of the evaluation after it, and every parameter's gradient."""
    from remit_megatron.mcore import optim, weighting
    from remit_megatron.mcore.groups import current_groups
    from remit_megatron.mcore.loss_hook import unwrap
    from remit_megatron.mcore.passes import run_schedule
    from remit_megatron.mcore.step import make_forward_step
    from remit_megatron.objectives import build_objective
    from remit_megatron.train.metrics import read, reduce_reports

    groups, objective = current_groups(), build_objective(settings)
    model = built(SMALL, parallel, 0, plain=adopted)
    needs = objective.needs_reference
    reference = built(REFERENCE, parallel, 1, plain=adopted, scorer=not adopted) if needs else None
    if adopted:
        hook = weighting.pre_wrap_hook(objective, lambda student: reference, valid_vocab=SMALL.vocab_size)
        [model] = hook([model])
        step: Any = partial(script_step, groups.deal())
    else:
        step = make_forward_step(objective, reference)
    chunks = optim.wrap_ddp([model], model.config, parallel)
    chunks[0].zero_grad_buffer()
    batches = local_microbatches(global_batches()[0], groups.dp.rank(), groups.dp.size(), documents=False)
    reports = run_schedule(step, batches, chunks, forward_only=False)
    declared = ("lm loss",) if adopted else objective.metrics
    ratios, _ = reduce_reports(reports, groups.counts_loss, [], BUILD.device, declared=declared)
    metrics = read(ratios)
    if adopted:
        inner = unwrap(chunks[0])
        taken = inner.take_metrics()
        assert inner.take_metrics() == {}
        assert len(inner.state_dict()) == len(built(SMALL, parallel, 0, plain=True).state_dict())
        if groups.counts_loss:
            assert metrics["lm loss"] == pytest.approx(taken["loss"], rel=1e-6)
        metrics = dict(taken)
        chunks[0].eval()
        with torch.no_grad():
            report = run_schedule(step, batches[:1], chunks, forward_only=True)[0]["lm loss"]
        metrics["evaluated"] = float(report[0])
    else:
        objective = build_objective({"name": "ntp"})
        with torch.no_grad():
            report = run_schedule(make_forward_step(objective), batches[:1], chunks, forward_only=True)[0]["nll"]
        metrics["evaluated"] = float(report[0])
    grads = {name: parameter.main_grad.clone() for name, parameter in unwrap(chunks[0]).named_parameters()}
    return {"metrics": metrics if groups.counts_loss else {}, "grads": grads}


def problems(layouts: dict[str, dict[str, Any]]) -> list[str]:
    from remit_megatron.mcore.groups import destroy_groups, initialize_groups

    found = []
    for name, settings in layouts.items():
        parallel = Parallel(distributed_optimizer=False, **settings)
        initialize_groups(parallel, seed=1)
        for objective in SETTINGS:
            want, got = (trained(objective, parallel, adopted=adopted) for adopted in (False, True))
            common = want["metrics"].keys() & got["metrics"].keys()
            assert common >= {"loss", "nll", "evaluated"} or not want["metrics"]
            for key in sorted(common):
                value = want["metrics"][key]
                if got["metrics"][key] != pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True):
                    found.append(f"{name} {objective}: {key} {got['metrics'][key]} is not {value}")
            for key, value in want["grads"].items():
                off = float((got["grads"][key] - value).abs().max() / value.abs().max().clamp(min=1e-12))
                if not off <= 1e-6:
                    found.append(f"{name} {objective}: gradient of {key} is off by {off:.1e} of its largest")
        destroy_groups()
    return found


def on_rank(rank: int) -> list[str]:
    activate("cpu")
    return problems(LAYOUTS)


def refusals(rank: int) -> list[str]:
    """What `adopt` and the adopted model refuse, and one rank's numbers."""
    activate("cpu")
    found = problems({"one rank": {}})
    from megatron.core.models.gpt import GPTModel

    from remit_megatron.mcore import weighting
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.loss_hook import hooked
    from remit_megatron.objectives import build_objective

    parallel = Parallel(distributed_optimizer=False)
    initialize_groups(parallel, seed=1)
    remit, ntp = build_objective({"name": "remit"}), build_objective({"name": "ntp"})

    def expect(words: str, call: Any) -> None:
        with pytest.raises(UserError, match=words):
            call()

    model, reference = (built(SMALL, parallel, seed, plain=True) for seed in (0, 1))
    expect("needs a reference", lambda: weighting.adopt(model, remit))
    by_document = build_objective({"name": "remit", "centering": "document"})
    expect("needs documents", lambda: weighting.adopt(model, by_document, reference))
    shuffled = build_objective({"name": "remit", "shuffle": True})
    expect("objective.shuffle", lambda: weighting.adopt(model, shuffled, reference))
    model.config.calculate_per_token_loss = False
    expect("--calculate-per-token-loss", lambda: weighting.adopt(model, remit, reference))
    model.config.calculate_per_token_loss = True
    model.config.pipeline_model_parallel_size = 2
    expect("cannot be pipelined: examples/megatron_lm/pretrain_remit.py", lambda: weighting.adopt(model, ntp))
    model.config.pipeline_model_parallel_size = 1
    expect("cannot be pipelined", lambda: weighting.pre_wrap_hook(ntp)([model, model]))
    expect("must be Megatron-Core's GPTModel", lambda: hooked(torch.nn.Linear(2, 2)))  # type: ignore[arg-type]
    assert type(model) is GPTModel, "a model that is refused stays as it was"

    rho1 = weighting.adopt(model, build_objective({"name": "rho1", "scope": "sequence"}), reference)
    local = dataclasses.replace(global_batches()[0]).local(_deal(), BUILD.device)
    inputs = (local.tokens[:MICROBATCH], local.position_ids[:MICROBATCH], None)
    masks = {"labels": local.labels[:MICROBATCH], "loss_mask": torch.ones(MICROBATCH, SEQUENCE)}
    expect("divides by the .* tokens that it selects", lambda: rho1(*inputs, **masks))
    expect("loss_mask", lambda: rho1(*inputs, labels=masks["labels"]))
    expect("packed_seq_params", lambda: rho1(*inputs, **masks, packed_seq_params=object()))
    assert rho1(*inputs).shape == (MICROBATCH, SEQUENCE, SMALL.vocab_size), "without labels: logits"

    class Own(GPTModel):
        def shout(self) -> str:
            return "own"

    own = built(SMALL, parallel, 0, plain=True)
    own.__class__ = Own
    assert weighting.adopt(own, ntp).shout() == "own"
    assert isinstance(own, Own)
    return found


def _deal() -> Any:
    from remit_megatron.mcore.groups import current_groups

    return current_groups().deal()


def test_an_adopted_model_trains_as_the_forward_step() -> None:
    for found in run_ranks(2, on_rank):
        assert not found, "\n".join(found)


def test_what_is_refused_and_one_rank() -> None:
    (found,) = run_ranks(1, refusals)
    assert not found, "\n".join(found)
