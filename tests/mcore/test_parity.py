"""Whatever the layout: the same loss, NLL, gradient norm and weight of every token as on one rank.

The tolerance is float32 round-off of sums in another order, measured on these shapes at 1e-6 to 5e-6 relative after
three updates; 2e-5 leaves room for another machine's matrix product, and is far below the effect of any dropped or
misplaced token (one token in 128 moves the loss by 1e-3). It is relative, except that a token's NLL below 0.5 nat and
the mean gap, differences of logits of magnitude 5, are held to the same error in nats as larger ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron.config import Parallel
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import REFERENCE, STUDENT, TIED, Case, Layout, assemble, on_rank, save_initial
from tests.ranks import run_ranks

RTOL = 2e-5
TOKEN_NLL_RTOL = 5e-5
"""A single token's NLL after updates: AdamW turns round-off of a gradient near zero into part of a step."""


def layout(name: str, merge_microbatches: int = 1, recompute: bool = False, **settings: Any) -> Layout:
    return Layout(name, Parallel(**{"distributed_optimizer": False, **settings}), recompute, merge_microbatches)


CASES = [
    Case("ntp", {"name": "ntp"}),
    Case("remit", {"name": "remit"}),
    Case("remit by document", {"name": "remit", "centering": "document", "epsilon": 0.1}, document_mask=True),
    Case("remit tied", {"name": "remit", "clip": False, "shuffle": True}, student=TIED),
    Case("rho1 sequence", {"name": "rho1", "share": 0.6}),
    Case("rho1 global", {"name": "rho1", "share": 0.6, "scope": "global"}),
    Case("kd", {"name": "kd", "kd_alpha": 0.7, "temperature": 1.5}),
    Case("kd top 5", {"name": "kd", "top_k": 5}),
    Case("kd reverse", {"name": "kd", "kd_alpha": 0.5, "temperature": 2.0, "direction": "reverse"}),
    Case("switch", {"name": "switch"}),
    Case("switch sequence tied", {"name": "switch", "scope": "sequence", "means": "token"}, student=TIED),
    Case("switch random", {"name": "switch", "share": 0.3, "route": "random", "nll_on": "all"}),
    Case("switch correct", {"name": "switch", "route": "correct", "target": "top1"}, document_mask=True),
    Case("trkd", {"name": "trkd", "share": 0.5}),
    Case("kd kept", {"name": "kd", "kd_alpha": 0.7, "temperature": 1.5}, top_k=9),
    Case("switch kept", {"name": "switch"}, top_k=9),
]
ONE = [layout("one rank"), layout("one rank, merged scoring", merge_microbatches=4)]
TWO = [
    layout("TP2", tensor=2),
    layout("TP2+SP", tensor=2, sequence=True, merge_microbatches=2),
    layout("TP2+SP recompute", tensor=2, sequence=True, recompute=True),
    layout("PP2", pipeline=2),
    layout("PP2xVPP2", pipeline=2, virtual_pipeline=2),
    layout("CP2", context=2),
    layout("DP2"),
    layout("DP2 distributed optimizer", distributed_optimizer=True),
    layout("DP2 overlapped", distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
]
FOUR = [
    layout("TP2xPP2+SP", tensor=2, pipeline=2, sequence=True, distributed_optimizer=True),
    layout("TP2xCP2", tensor=2, context=2),
    layout("PP2xVPP2xCP2", pipeline=2, virtual_pipeline=2, context=2, distributed_optimizer=True),
]


def _on_first_rank(rank: int, folder: str) -> dict[str, Any]:
    """Save the initial weights of every model, and train all cases on one rank."""
    activate("cpu")
    save_initial(Path(folder), {"student": STUDENT, "reference": REFERENCE, "tied": TIED})
    return on_rank(rank, folder, CASES, ONE)


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def expected(initial: str) -> dict[str, Any]:
    return run_ranks(1, _on_first_rank, initial)[0]


def compare(
    results: list[dict[str, Any]], expected: dict[str, Any], layouts: list[Layout], cases: list[Case] = CASES
) -> None:
    problems = []
    for one in layouts:
        for case in cases:
            name = f"{one.name} {case.name}"
            got = [result[name] for result in results]
            want = expected[f"one rank {case.name}"]
            for step, (a, b) in enumerate(zip(got[0]["steps"], want["steps"], strict=True)):
                assert a.keys() == b.keys()
                problems += [
                    f"{name} step {step} {key}: {a[key]:.8f} for {b[key]:.8f}"
                    for key in b
                    if not np.isclose(a[key], b[key], rtol=RTOL, atol=RTOL if key == "gap_mean" else 1e-7)
                ]
            tokens, reference = assemble(got, one.parallel.context), assemble([want], 1)
            assert tokens.keys() == reference.keys()
            for key in reference:
                error = np.abs(tokens[key] - reference[key]) / np.maximum(np.abs(reference[key]), 0.5)
                if not error.max() <= (
                    TOKEN_NLL_RTOL if key == "nll" else RTOL
                ):  # a nan is a token that no rank reported
                    problems.append(f"{name} {key}: largest relative error of a token {error.max():.1e}")
            microbatches = sum(len(r["tokens"]) for r in got)
            if microbatches != len(want["tokens"]) * one.parallel.context:
                problems.append(f"{name}: {microbatches} microbatches were reported")
    assert not problems, "\n".join(problems)


def test_one_rank_is_a_real_case(expected: dict[str, Any]) -> None:
    """The comparison would be empty with uniform weights, with no clipping, or with nothing masked."""
    table = assemble([expected["one rank remit"]], 1)
    kept = table["mask"] > 0
    weights = table["weight"][kept]
    assert 0.3 < kept.mean() < 0.7
    assert weights.std() > 0.1
    assert (weights < 0.8001).mean() > 0.05
    assert (weights > 1.1999).mean() > 0.05
    assert (table["weight"][~kept] == 0).all()
    steps = expected["one rank remit"]["steps"]
    assert abs(steps[2]["nll"] - steps[0]["nll"]) > 1e-3, "the weights must have been updated"


def test_merged_scoring(expected: dict[str, Any]) -> None:
    compare([expected], expected, ONE)


def test_two_ranks(initial: str, expected: dict[str, Any]) -> None:
    compare(run_ranks(2, on_rank, initial, CASES, TWO), expected, TWO)


def test_four_ranks(initial: str, expected: dict[str, Any]) -> None:
    compare(run_ranks(4, on_rank, initial, CASES, FOUR), expected, FOUR)
