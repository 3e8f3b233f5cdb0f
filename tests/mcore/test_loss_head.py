"""The student's head by sequence chunks gives what whole logits give: loss, token weights and every gradient.

Both heads train the same model on the same microbatches in one layout, through Megatron's schedule and its DDP. The
tolerance is float32 round-off of matrix products cut differently, 1e-6 of a parameter's largest gradient as measured
on these shapes; 1e-5 leaves room for other machines, and one token dropped out of 128 would move a gradient by 1e-2.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from remit_megatron.config import Parallel
from remit_megatron.data.deal import Deal
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.mcore.groups import destroy_groups
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import BUILD, SEQUENCE, STUDENT, TIED, Recorder
from tests.mcore.refusals import messages_of
from tests.ranks import run_ranks
from tests.train import runs

RTOL = 1e-5


class NotBySample(Recorder):
    by_sample = False


class Layout(NamedTuple):
    name: str
    settings: dict[str, Any]


ONE = [Layout("one rank", {})]
TWO = [
    Layout("TP2", {"tensor": 2}),
    Layout("TP2+SP", {"tensor": 2, "sequence": True}),
    Layout("CP2", {"context": 2}),
    Layout("PP2", {"pipeline": 2}),
    Layout("PP2xVPP2", {"pipeline": 2, "virtual_pipeline": 2}),
    Layout("DP2 overlapped", {"distributed_optimizer": True, "overlap_grad_reduce": True}),
]
OBJECTIVES = {
    "ntp": {"name": "ntp"},
    "remit": {"name": "remit"},
    "remit by document": {"name": "remit", "centering": "document"},
}


def microbatches(deal: Deal) -> list[Microbatch]:
    """Two, of [2, SEQUENCE], with ragged masks, documents, and one sample without a trained token."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for i in range(2):
        text = torch.randint(1, STUDENT.vocab_size, (2, SEQUENCE + 1), generator=generator)
        mask = (torch.rand(2, SEQUENCE, generator=generator) < 0.7).float()
        mask[1] *= i
        segments = (torch.rand(2, SEQUENCE, generator=generator) < 0.2).long().cumsum(1)
        ref_nll = torch.rand(2, SEQUENCE, generator=generator) * 8
        one = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "segment_ids": segments}
        one = {key: value.contiguous() for key, value in (one | {"ref_nll": ref_nll}).items()}
        batches.append(Microbatch.from_dict(one, deal))
    return batches


def gradients(head: str, shape: Any, objective: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """One schedule with two microbatches: reports, what each token got, and every parameter's main_grad."""
    from remit_megatron.mcore import optim
    from remit_megatron.mcore.groups import current_groups
    from remit_megatron.mcore.loss_hook import unwrap
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.passes import run_schedule
    from remit_megatron.mcore.step import make_forward_step
    from remit_megatron.objectives import build_objective
    from tests.mcore.harness import randomise

    build = dataclasses.replace(BUILD, loss_head=head)
    chunks, config = build_chunks(shape, parallel, build, max_sequence_length=SEQUENCE)
    randomise(chunks)
    chunks = optim.wrap_ddp(chunks, config, parallel)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    recorder = Recorder(build_objective(dict(objective)))
    batches = microbatches(current_groups().deal())
    reports = run_schedule(make_forward_step(recorder), batches, chunks, forward_only=False)
    seen = recorder.seen
    tokens = {key: torch.cat([record[key] for record in seen]) for key in seen[0]} if seen else {}
    grads = {
        f"{i} {name}": parameter.main_grad.clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }
    calls = sum(unwrap(chunk).loss_calls for chunk in chunks)
    state = sorted(key for chunk in chunks for key in unwrap(chunk).state_dict())
    return {"reports": reports, "tokens": tokens, "grads": grads, "calls": calls, "state": state}


def on_rank(rank: int, layouts: list[Layout]) -> list[str]:
    """What differs between the two heads, over all layouts, objectives and shapes."""
    activate("cpu")
    from remit_megatron.mcore.groups import initialize_groups

    problems = []
    for layout in layouts:
        parallel = Parallel(**{"distributed_optimizer": False, **layout.settings})
        initialize_groups(parallel, seed=1)
        for shape_name, shape in {"untied": STUDENT, "tied": TIED}.items():
            for name, objective in OBJECTIVES.items():
                want, got = (gradients(head, shape, objective, parallel) for head in ("logits", "sequence_chunks"))
                found = difference(got, want)
                problems += [f"{layout.name}, {shape_name}, {name}: {problem}" for problem in found]
        destroy_groups()
    return problems


def difference(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    assert got["calls"] == want["calls"]
    assert got["state"] == want["state"]
    problems = []
    assert len(got["reports"]) == len(want["reports"])
    for a, b in zip(got["reports"], want["reports"], strict=True):
        assert a.keys() == b.keys()
        problems += [f"{key}: {a[key]} for {b[key]}" for key in b if not torch.allclose(a[key], b[key], rtol=RTOL)]
    for part in ("tokens", "grads"):
        assert got[part].keys() == want[part].keys()
        for key, wanted in want[part].items():
            error = (got[part][key] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            if not error <= RTOL:
                problems.append(f"{key}: error {error:.1e} of the largest")
    if not any(grad.abs().max() > 1e-2 for grad in want["grads"].values()):
        problems.append("no gradient to compare")
    return problems


def test_one_rank() -> None:
    assert run_ranks(1, on_rank, ONE) == [[]]


def test_two_ranks() -> None:
    assert run_ranks(2, on_rank, TWO) == [[], []]


class LargestLogits(TorchDispatchMode):
    """The most rows of any tensor with a vocabulary as its last dimension."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.ndim and one.size(-1) == self.vocab:
                self.rows = max(self.rows, one.numel() // self.vocab)
        return out


def alone(rank: int) -> dict[str, Any]:
    """What needs no other rank: rows of logits that exist in a training step, and the messages of refusals."""
    activate("cpu")
    from remit_megatron.mcore.families import layer_spec
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.loss_hook import RemitGPTModel
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.passes import run_schedule
    from remit_megatron.mcore.step import make_forward_step
    from remit_megatron.objectives import NTP

    initialize_groups(Parallel(), seed=1)
    batch, found = microbatches(Deal())[0], {}
    shape = STUDENT.model_copy(update={"vocab_size": 67, "hidden_size": 12})  # a transposed head has 12 rows
    models = {}
    for head in ("logits", "sequence_chunks"):
        build = dataclasses.replace(BUILD, loss_head=head)
        (models[head],), _ = build_chunks(shape, Parallel(), build, max_sequence_length=SEQUENCE)
        with LargestLogits(67) as largest:
            run_schedule(make_forward_step(NTP()), [batch], [models[head]], forward_only=False)
        found[head] = largest.rows
    model = models["sequence_chunks"]
    positions = torch.arange(SEQUENCE).expand(2, -1)

    def build_with(key: str) -> None:
        config = copy.copy(model.config)  # Megatron's own checks would ask for more than the one key
        setattr(config, key, True)
        RemitGPTModel(config, layer_spec(STUDENT, "local"), 67, SEQUENCE, loss_head="sequence_chunks")

    cases = {
        "objective": lambda: run_schedule(make_forward_step(NotBySample(NTP())), [batch], [model], forward_only=True),
        "alone": lambda: model(batch.tokens, positions, None, labels=batch.labels),
        "fp16": lambda: build_with("fp16"),
        "deferred": lambda: build_with("defer_embedding_wgrad_compute"),
    }
    found |= messages_of(cases)
    with torch.no_grad():
        nll = [one(batch.tokens, positions, None, labels=batch.labels) for one in models.values()]
    found["nll"] = [nll[0].shape == nll[1].shape == (2, SEQUENCE), nll[1].requires_grad]
    destroy_groups()
    return found


def test_logits_of_one_sample_exist() -> None:
    (found,) = run_ranks(1, alone)
    assert found["logits"] == 2 * SEQUENCE
    assert found["sequence_chunks"] == SEQUENCE
    assert "cannot serve objective 'ntp'" in found["objective"]
    assert "trains inside RemitGPTModel.using(BySequence(...)) only" in found["alone"]
    assert "fp16 needs 'logits'" in found["fp16"]
    assert "defer_embedding_wgrad_compute" in found["deferred"]
    assert found["nll"] == [True, False]


def test_a_run_by_recipe(tmp_path: Path) -> None:
    """Training, held-out evaluation and the checkpoint; the same metrics as the default head, to float32 round-off."""
    runs.make_data(tmp_path)
    short = {"schedule": {"train_tokens": 4 * 128, "warmup_tokens": 128}, "evaluation": {"every_steps": 2}}
    recipes = [
        runs.settings(tmp_path, name, **short, compute={"loss_head": head})
        for name, head in (("whole", "logits"), ("chunks", "sequence_chunks"))
    ]
    (outcomes,) = run_ranks(1, runs.train_all, recipes)
    assert outcomes == [(0, ""), (0, "")]
    whole, chunks = (runs.metrics(tmp_path, name) for name in ("whole", "chunks"))
    assert len(whole) == len(chunks) == 4
    for a, b in zip(whole, chunks, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert "eval/held/nll" in whole[-1]
