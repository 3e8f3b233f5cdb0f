"""The replayed reference pass without a GPU: its buffers and its guard, over captures that run again on the CPU.

What CUDA does at capture is not tested here. A replay is a pass that runs again over the same buffers into the same
result, which these captures do, or fail to do as a broken graph would.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.config import Parallel, parse_recipe
from remit_megatron.errors import RunError, UserError
from remit_megatron.fit import check_graph
from remit_megatron.mcore.graph import TOLERANCE_NATS, Replayed
from remit_megatron.mcore.platform import activate
from remit_megatron.objectives import Remit
from tests.mcore.harness import (
    BUILD,
    MICROBATCH,
    SAMPLES,
    SEQUENCE,
    STEPS,
    STUDENT,
    global_batches,
    local_microbatches,
    randomise,
)
from tests.ranks import run_ranks
from tests.test_plan import recipe

Run = Callable[[], Tensor]


def rerun(run: Run) -> tuple[Tensor, Callable[[], object]]:
    output = run()
    return output, lambda: output.copy_(run())


def stale(run: Run) -> tuple[Tensor, Callable[[], object]]:
    """A graph that reads other memory than its buffers: every replay gives what the capture gave."""
    return run(), lambda: None


class StaleAfter:
    """A graph whose memory is taken away after some replays."""

    def __init__(self, replays: int):
        self.left = replays

    def __call__(self, run: Run) -> tuple[Tensor, Callable[[], object]]:
        output = run()

        def replay() -> None:
            self.left -= 1
            if self.left >= 0:
                output.copy_(run())

        return output, replay


class Pass:
    """A pass over tokens and labels that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.runs += 1
        return tokens.float() * 0.5 - labels.float() * 3


def inputs(seed: int, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(50, (2, length), generator=generator) for name in ("tokens", "labels")}


def test_every_pass_has_its_own_inputs_and_result() -> None:
    run, replayed, kept = Pass(), Replayed(rerun, check_every=100), []
    for seed in range(6):
        for length in (8, 5):
            given = inputs(seed, length)
            before = {name: x.clone() for name, x in given.items()}
            kept.append((replayed(run, given), Pass()(**given)))
            assert all(torch.equal(given[name], before[name]) for name in given)
    assert all(torch.equal(got, want) for got, want in kept), "a later pass has written into an earlier result"


def test_checks_are_made_at_the_start_and_every_so_many_passes() -> None:
    run, replayed = Pass(), Replayed(rerun, check_every=3)
    for i in range(7):
        before = run.runs
        replayed(run, inputs(i))
        assert run.runs - before == (i == 0) + 1 + (i % 3 == 0)  # capture, replay, check


def test_a_graph_that_does_not_read_its_buffers_is_found_at_once() -> None:
    with pytest.raises(RunError, match=r"reference\.cuda_graph: a replay differs"):
        Replayed(stale)(Pass(), inputs(0))


def test_a_graph_that_goes_stale_is_found_at_the_next_check() -> None:
    run, replayed = Pass(), Replayed(StaleAfter(2), check_every=4)
    for seed in range(4):
        replayed(run, inputs(seed))
    with pytest.raises(RunError, match="scores since the last check may be wrong"):
        replayed(run, inputs(4))


@pytest.mark.parametrize(
    ("shift", "fine"), [(TOLERANCE_NATS * 0.9, True), (TOLERANCE_NATS * 1.2, False), (torch.nan, False)]
)
def test_round_off_passes_and_nan_does_not(shift: float, fine: bool) -> None:
    def shifted(run: Run) -> tuple[Tensor, Callable[[], object]]:
        output = run()
        return output, lambda: output.copy_(run() + shift)

    if fine:
        Replayed(shifted)(Pass(), inputs(0))
        return
    with pytest.raises(RunError, match="a replay differs"):
        Replayed(shifted)(Pass(), inputs(0))


def scored(rank: int) -> dict[str, Any]:
    """Scores of one reference by replay and without, and how often its pass was captured."""
    activate("cpu")
    from remit_megatron.mcore import passes
    from remit_megatron.mcore.groups import destroy_groups, initialize_groups
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.step import make_forward_step

    groups = initialize_groups(Parallel(), seed=1)
    chunks, _ = build_chunks(STUDENT, Parallel(), BUILD, max_sequence_length=SEQUENCE, scorer=True)
    randomise(chunks)
    captures = []

    def counted(run: Run) -> tuple[Tensor, Callable[[], object]]:
        captures.append(run)
        return rerun(run)

    found: dict[str, Any] = {}
    for name, graph in (("eager", None), ("replayed", Replayed(counted, check_every=2))):
        step = make_forward_step(Remit(), chunks, groups=groups, merge_microbatches=2, graph=graph)
        found[name] = []
        for batch in global_batches():
            found[name] += [
                one.scores.ref_nll
                for one in step.scored(local_microbatches(batch, 0, 1, documents=False))
                if one.scores is not None
            ]
        student = passes.nll(chunks, local_microbatches(global_batches()[0], 0, 1, documents=False), groups, merge=2)
    assert all(torch.equal(a, b) for a, b in zip(student, found["eager"], strict=False)), "a student is never replayed"
    destroy_groups()
    return {**found, "captures": len(captures)}


def test_a_step_scores_by_replay() -> None:
    (found,) = run_ranks(1, scored)
    assert found["captures"] == 1
    assert len(found["eager"]) == STEPS * SAMPLES // MICROBATCH
    assert all(torch.equal(a, b) for a, b in zip(found["replayed"], found["eager"], strict=True))
    assert len({float(nll.sum()) for nll in found["eager"]}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "compute.device = 'cuda'"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor, pipeline and context = 1"),
        ({"model": {"implementation": "transformer_engine"}}, "model.implementation = 'local'"),
        ({"data": {"document_mask": True}}, "data.document_mask = false"),
        ({"objective": {"name": "kd"}}, "an objective that takes scores"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    asked = recipe(reference={"cuda_graph": True}, **{k: v for k, v in changes.items() if k != "objective"})
    if "objective" in changes:
        asked = parse_recipe({**asked.model_dump(exclude_none=True), **changes})
    with pytest.raises(UserError, match=r"reference\.cuda_graph = true needs") as error:
        check_graph(asked, "cuda" if changes else "cpu")
    assert message in str(error.value)
    check_graph(recipe(reference={"cuda_graph": True}), "cuda")
    check_graph(recipe(), "cpu")
