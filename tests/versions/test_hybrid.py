"""Megatron-Core's HybridModel under this package's loss: GPTModel's numbers, from GPTModel's checkpoints, and back.

Against one rank of GPTModel with the tolerance of tests/mcore/test_parity.py; without a layout in between, bit for bit.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from remit_megatron.config import Optimizer, Parallel, Schedule
from remit_megatron.errors import UserError
from remit_megatron.mcore import compat, dist_checkpoint, optim
from remit_megatron.mcore.groups import destroy_groups, initialize_groups
from remit_megatron.mcore.loss_hook import unwrap
from remit_megatron.mcore.model import build_chunks
from remit_megatron.mcore.passes import run_schedule
from remit_megatron.mcore.platform import activate
from remit_megatron.mcore.step import make_forward_step
from remit_megatron.objectives import NTP
from remit_megatron.shape import Latent
from remit_megatron.train.metrics import read, reduce_reports
from tests.mcore.harness import (
    BUILD,
    REFERENCE,
    SAMPLES,
    SEQUENCE,
    STUDENT,
    TIED,
    Case,
    Layout,
    global_batches,
    local_microbatches,
    on_rank,
    randomise,
    save_initial,
)
from tests.mcore.refusals import messages_of
from tests.mcore.test_parity import RTOL, compare, layout
from tests.ranks import run_ranks

HYBRID = dataclasses.replace(BUILD, stack="hybrid")
CASES = [
    Case("remit", {"name": "remit"}),
    Case("remit tied", {"name": "remit", "clip": False, "shuffle": True}, student=TIED),
    Case("remit by document", {"name": "remit", "centering": "document", "epsilon": 0.1}, document_mask=True),
    Case("kd", {"name": "kd", "kd_alpha": 0.7, "temperature": 1.5}),
]
ONE = [layout("one rank")]
TWO = [
    layout("TP2+SP", tensor=2, sequence=True),
    layout("TP2+SP recompute", tensor=2, sequence=True, recompute=True),
    layout("PP2", pipeline=2),
    layout("PP2xVPP2", pipeline=2, virtual_pipeline=2),
    layout("CP2", context=2),
    layout("DP2 distributed optimizer", distributed_optimizer=True),
]
STATES = [
    layout("DP2 distributed optimizer", distributed_optimizer=True),
    layout("PP2 distributed optimizer", pipeline=2, distributed_optimizer=True),
]
FAMILIES = {
    "per-head norms": STUDENT.model_copy(update={"qk_norm": "per_head"}),
    "norms after": STUDENT.model_copy(update={"qk_norm": "full_width", "norm_placement": "post"}),
    "no positions, biases": STUDENT.model_copy(update={"no_rope_layers": (1, 3), "qkv_bias": True}),
    "latent": STUDENT.model_copy(
        update={
            "latent": Latent(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
            "kv_channels": 12,
            "num_query_groups": 4,
        }
    ),
}

needs_hybrid = pytest.mark.skipif(not compat.has_hybrid_model(), reason="needs Megatron-Core 0.19: make test-newest")


def as_hybrid(rank: int, folder: str, cases: list[Case], layouts: list[Layout]) -> dict[str, Any]:
    """The parity harness, whose models are then HybridModels, references included."""
    from tests.mcore import harness

    harness.BUILD = HYBRID
    return on_rank(rank, folder, cases, layouts)


def one_rank(rank: int, folder: str) -> dict[str, Any]:
    activate("cpu")
    save_initial(Path(folder), {"student": STUDENT, "reference": REFERENCE, "tied": TIED})
    return {"gpt": on_rank(rank, folder, CASES, ONE), "hybrid": as_hybrid(rank, folder, CASES, ONE)}


def two_ranks(rank: int, folder: str) -> dict[str, Any]:
    activate("cpu")
    return {"gpt": on_rank(rank, folder, CASES, TWO), "hybrid": as_hybrid(rank, folder, CASES, TWO)}


@needs_hybrid
def test_parity_of_both_classes(tmp_path: Path) -> None:
    (one,) = run_ranks(1, one_rank, str(tmp_path))
    for case in CASES:
        name = f"one rank {case.name}"
        assert one["hybrid"][name]["steps"] == one["gpt"][name]["steps"], f"{name}: not to the bit"
    ranks = run_ranks(2, two_ranks, str(tmp_path))
    for stack in ("gpt", "hybrid"):
        compare([results[stack] for results in ranks], one["gpt"], TWO, CASES)


def round_trips(rank: int, folder: Path) -> dict[str, Any]:
    """Of each family: its weights by GPTModel's checkpoint into a HybridModel and back, logits, names; and the rest."""
    activate("cpu")
    initialize_groups(Parallel(), seed=1)
    tokens = torch.arange(SEQUENCE).remainder(STUDENT.vocab_size).expand(2, SEQUENCE)
    found: dict[str, Any] = {}
    for name, shape in FAMILIES.items():
        models = {}
        for stack, build in {"gpt": BUILD, "hybrid": HYBRID, "gpt again": BUILD}.items():
            models[stack], _ = build_chunks(shape, Parallel(), build, max_sequence_length=SEQUENCE)
        randomise(models["gpt"])
        for written, reader in (("gpt", "hybrid"), ("hybrid", "gpt again")):
            (folder / f"{name} {written}").mkdir()
            dist_checkpoint.save(folder / f"{name} {written}", models[written], None)
            before = dist_checkpoint.first_rows(models[reader])
            dist_checkpoint.load_model(folder / f"{name} {written}", models[reader])
            found[f"{name} unread by {reader}"] = dist_checkpoint.unchanged_matrices(models[reader], before)
        with torch.no_grad():
            logits = [unwrap(chunk)(tokens, tokens * 0 + torch.arange(SEQUENCE), None) for (chunk,) in models.values()]
        found[f"{name} logits"] = [torch.equal(one, logits[0]) for one in logits]
        found[f"{name} spread"] = [float(one.std()) for one in logits]
    destroy_groups()
    return found


@needs_hybrid
def test_checkpoints_of_every_family(tmp_path: Path) -> None:
    (found,) = run_ranks(1, round_trips, tmp_path)
    for name in FAMILIES:
        assert found[f"{name} logits"] == [True, True, True], name
        assert found[f"{name} unread by hybrid"] == found[f"{name} unread by gpt again"] == []
        assert min(found[f"{name} spread"]) > 0.3, "logits without spread would hide an error"


def train_on(stack: str, one: Layout, numbers: list[int], source: Path | None, target: Path) -> list[dict[str, Any]]:
    """Loss, gradient norm of the steps of these numbers, from a training state (or random weights) and into another."""
    parallel, build = one.parallel, BUILD if stack == "gpt" else HYBRID
    groups = initialize_groups(parallel, seed=1)
    chunks, config = build_chunks(TIED, parallel, build, max_sequence_length=SEQUENCE)
    if source is None:
        randomise(chunks)
    chunks = optim.wrap_ddp(chunks, config, parallel)
    schedule = Schedule(train_tokens=10 * SAMPLES * SEQUENCE)
    settings = Optimizer(peak_lr=1e-2, min_lr=1e-3)
    optimizer, scheduler = optim.build_optimizer(chunks, settings, schedule, parallel, build.dtype)
    if source is not None:
        dist_checkpoint.load_training(source, chunks, optimizer)
    objective, lines = NTP(), list[dict[str, Any]]()
    step, batches = make_forward_step(objective, groups=groups), global_batches()
    for number in numbers:
        optim.advance(scheduler, (number + 1) * SAMPLES * SEQUENCE)
        optim.zero_grads(chunks, optimizer)
        mine = local_microbatches(batches[number], groups.dp.rank(), groups.dp.size(), False)
        reports = run_schedule(step, mine, chunks, forward_only=False)
        ratios, _ = reduce_reports(reports, groups.counts_loss, [], BUILD.device, declared=objective.metrics)
        lines.append({**read(ratios), "grad_norm": optim.optimizer_step(optimizer, 1.0)[1]})
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpoint.save(target, chunks, optimizer)
    destroy_groups()
    return lines


def handed_over(rank: int, folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """In each layout: two steps by either class after two of GPTModel's, and two after HybridModel's."""
    activate("cpu")
    found = {}
    for one in STATES:
        place = folder / one.name
        train_on("gpt", one, [0, 1], None, place.with_suffix(".gpt"))
        lines = [
            train_on(stack, one, [2, 0], place.with_suffix(".gpt"), place.with_suffix(f".{stack}2"))
            for stack in ("gpt", "hybrid")
        ]
        lines += [
            train_on(stack, one, [1, 2], place.with_suffix(".hybrid2"), place.with_suffix(f".{stack}3"))
            for stack in ("gpt", "hybrid")
        ]
        found[one.name] = lines
    return found


@needs_hybrid
def test_a_training_state_goes_on_in_the_other_class(tmp_path: Path) -> None:
    """Moments included: with lost ones the step after a load is a first one, and the loss after it another."""
    for found in run_ranks(2, handed_over, tmp_path):
        for name, (gpt, hybrid, gpt_back, hybrid_on) in found.items():
            for want, got in ((gpt, hybrid), (hybrid_on, gpt_back)):
                for a, b in zip(want, got, strict=True):
                    assert a.keys() == b.keys()
                    for key in a:
                        assert np.isclose(a[key], b[key], rtol=RTOL), f"{name} {key}: {b[key]} for {a[key]}"


def fresh(rank: int) -> dict[str, Any]:
    """Spreads of a new model's output projections in both classes, and what is refused."""
    activate("cpu")
    initialize_groups(Parallel(), seed=1)
    found: dict[str, Any] = {}
    wide = STUDENT.model_copy(update={"hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 32})
    for stack, build in {"gpt": BUILD, "hybrid": HYBRID}.items():
        (chunk,), _ = build_chunks(wide, Parallel(), build, max_sequence_length=SEQUENCE)
        weights = {name: p for name, p in unwrap(chunk).named_parameters() if p.ndim > 1}
        found[stack] = {
            part: [float(p.std()) for name, p in weights.items() if part in name]
            for part in ("linear_proj", "linear_fc2", "linear_qkv", "linear_fc1")
        }
    if compat.has_hybrid_model():
        from remit_megatron.mcore import hybrid
        from remit_megatron.mcore.model import make_config

        def build_with(**changes: Any) -> None:
            config = make_config(STUDENT, Parallel(), HYBRID)
            for key, value in changes.items():
                setattr(config, key, value)
            hybrid.build(STUDENT, Parallel(), "local", config, 61, SEQUENCE, {})

        cases = {
            "layers": lambda: build_with(num_layers=4),
            "spread": lambda: build_with(is_hybrid_model=False),
            "rope": lambda: build_chunks(
                STUDENT.model_copy(update={"rope_llama3_factor": 8.0}),
                Parallel(),
                HYBRID,
                max_sequence_length=SEQUENCE,
            ),
        }
        found |= messages_of(cases)
    destroy_groups()
    return found


@needs_hybrid
def test_a_new_model_has_gpt_models_spread() -> None:
    """Of 16,384 weights a matrix: a spread is known to 1%; the fault to be seen is 29%."""
    (found,) = run_ranks(1, fresh)
    for part, spreads in found["gpt"].items():
        assert len(spreads) == len(found["hybrid"][part]) == STUDENT.num_layers
        for one, other in zip(spreads, found["hybrid"][part], strict=True):
            assert one == pytest.approx(other, rel=0.05), part
    assert max(found["gpt"]["linear_proj"]) < 0.5 * min(found["gpt"]["linear_qkv"]), "it is what the test is about"
    assert "num_layers = 4, and hybrid_layer_pattern = '*-*-*-*-' has 8 layers" in found["layers"]
    assert "needs is_hybrid_model = True" in found["spread"]
    assert "HybridModel does not take Llama 3's rope_scaling: use stack = 'gpt'" in found["rope"]


def build_hybrid(rank: int) -> str:
    activate("cpu")
    initialize_groups(Parallel(), seed=1)
    try:
        build_chunks(STUDENT, Parallel(), HYBRID, max_sequence_length=SEQUENCE)
    except UserError as error:
        return str(error)
    finally:
        destroy_groups()
    return "built"


@pytest.mark.skipif(compat.has_hybrid_model(), reason="this Megatron-Core has it")
def test_an_old_megatron_core_is_named() -> None:
    (said,) = run_ranks(1, build_hybrid)
    assert said.startswith("stack = 'hybrid' needs the HybridModel of Megatron-Core 0.19 or newer, and 0.1")
