"""Tensor and context parallelism on gloo: one spawn carries every case, and the parent compares with float64."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from remit_megatron.ops import spec
from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll
from remit_megatron.ops.weights import remit_weights
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    Case,
    check_gradient,
    check_nll,
    check_no_worse_than_torch,
    make_case,
)
from tests.ops.groups import SIZES, WORLD, CollectiveCounter, make_groups
from tests.ranks import run_ranks

TP_CASES: dict[str, dict[str, Any]] = {
    "labels on the edges": {"s": 9, "b": 2, "vocab": 32, "edge": 8},
    "ragged padding": {"s": 6, "b": 3, "vocab": 32, "valid_vocab": 27, "edge": 8},
    "two shards without a valid column": {"s": 5, "b": 2, "vocab": 32, "valid_vocab": 13, "edge": 8},
    "valid columns end on an edge": {"s": 5, "b": 2, "vocab": 32, "valid_vocab": 16, "edge": 8},
    "exp would overflow": {"s": 6, "b": 2, "vocab": 64, "valid_vocab": 61, "scale": 60.0},
    "bfloat16": {"s": 9, "b": 2, "vocab": 32, "valid_vocab": 30, "dtype": torch.bfloat16},
    "bfloat16, exp would overflow": {"s": 9, "b": 2, "vocab": 32, "scale": 60.0, "dtype": torch.bfloat16},
    "float16": {"s": 9, "b": 2, "vocab": 32, "valid_vocab": 30, "dtype": torch.float16},
}
CHUNKS = (3, 64)
EXPANDED = "one row behind every token"
DRAWN = 40


@dataclass(frozen=True)
class Drawn:
    """A case that hypothesis drew, and how its logits lie in memory."""

    shape: dict[str, Any]
    layout: str
    at_the_ends: bool
    """Every logit is 1e4 or -1e4."""

    def case(self) -> Case:
        case = make_case(**self.shape)
        if self.at_the_ends:
            case.logits[..., : case.valid_vocab] = case.logits[..., : case.valid_vocab].sign() * 1e4
        if self.layout == EXPANDED:
            case = dataclasses.replace(case, logits=case.logits[:1, :1].expand_as(case.logits))
        return case


def draw_cases() -> list[Drawn]:
    """Shards of 1 to 20 columns on 4 ranks with labels at their edges, and any number of valid columns, from 1 on."""
    found = []

    @given(data=st.data())
    @settings(max_examples=DRAWN, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def draw(data: st.DataObject) -> None:
        width = data.draw(st.integers(1, 20))
        valid = data.draw(st.one_of(st.integers(1, 4 * width), st.sampled_from([1, width, 2 * width, 4 * width])))
        shape = {
            "seed": data.draw(st.integers(0, 2**31)),
            "s": data.draw(st.integers(1, 9)),
            "b": data.draw(st.integers(1, 4)),
            "vocab": 4 * width,
            "valid_vocab": valid,
            "edge": width,
            "scale": data.draw(st.sampled_from([0.0, 1.0, 60.0, 3e3])),
            "dtype": data.draw(st.sampled_from(DTYPES)),
        }
        layout = [EXPANDED, *LAYOUTS][len(found) % (1 + len(LAYOUTS))]
        found.append(Drawn(shape, layout, data.draw(st.booleans())))

    draw()
    return found


def arranged(leaf: Tensor, layout: str) -> Tensor:
    """The leaf's values as an output of an operation with the layout's strides."""
    return (leaf[:1, :1] * 1).expand_as(leaf) if layout == EXPANDED else LAYOUTS[layout](leaf * 1)


def tp_on_rank(case: Case, layout: str, group: dist.ProcessGroup) -> dict[str, Any]:
    size, tp_rank = dist.get_world_size(group), dist.get_rank(group)
    local = case.logits.shape[-1] // size
    leaf = case.logits[..., tp_rank * local : (tp_rank + 1) * local].clone().requires_grad_()
    logits, again = (arranged(leaf, layout) for _ in range(2))
    before = logits.detach().clone()
    with CollectiveCounter() as forward:
        nll = token_nll(logits, case.labels, valid_vocab=case.valid_vocab, tp_group=group)
    unchanged = torch.equal(logits.detach(), before)
    with CollectiveCounter() as backward:
        (gradient,) = torch.autograd.grad(nll, logits, case.upstream)
    nll_again = token_nll(again, case.labels, valid_vocab=case.valid_vocab, tp_group=group)
    (gradient_again,) = torch.autograd.grad(nll_again, again, case.upstream)
    return {
        "nll": nll.detach(),
        "gradient": gradient.contiguous(),
        "repeats": torch.equal(nll_again, nll) and torch.equal(gradient_again, gradient),
        "unchanged": unchanged,
        "collectives": (forward.counts.total(), backward.counts.total()),
    }


def make_head() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 29, (11,), generator=generator)
    labels[3] = spec.IGNORED_LABEL
    return torch.randn(11, 6, generator=generator), torch.randn(32, 6, generator=generator), labels


def head_on_rank(group: dist.ProcessGroup) -> dict[str, Any]:
    hidden, weight, labels = make_head()
    shard = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    sharding: dict[str, Any] = {"valid_vocab": 29, "tp_group": group}
    found: dict[str, Any] = {"whole": token_nll(hidden @ shard.t(), labels, **sharding)}
    for chunk_tokens in CHUNKS:
        with CollectiveCounter() as counter:
            found[f"chunks of {chunk_tokens}"] = linear_nll(
                hidden, shard, labels, chunk_tokens=chunk_tokens, **sharding
            )
        found[f"collectives of {chunk_tokens}"] = counter.counts.total()
    return found


def make_gaps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, ref_nll, mask and documents [3, 16]; a row without tokens, a quarter without, documents over the cuts."""
    generator = torch.Generator().manual_seed(3)
    nll, ref_nll = (torch.rand(3, 16, generator=generator) * 6 for _ in range(2))
    mask = (torch.rand(3, 16, generator=generator) > 0.3).float()
    mask[1] = 0
    mask[2, 4:8] = 0
    nll[1], ref_nll[2, 5] = torch.inf, torch.nan
    segment_ids = torch.tensor([[0] * 3 + [1] * 8 + [2] * 5, [0] * 16, [0] * 4 + [1] * 4 + [15] * 8])
    return nll, ref_nll, mask, segment_ids


def cp_on_rank(group: dist.ProcessGroup) -> dict[str, Any]:
    """The rank's two chunks of a zigzag cut, as Megatron makes them."""
    size, cp_rank = dist.get_world_size(group), dist.get_rank(group)

    def part(x: Tensor) -> Tensor:
        chunks = x.chunk(2 * size, dim=1)
        return torch.cat([chunks[cp_rank], chunks[2 * size - 1 - cp_rank]], dim=1)

    nll, ref_nll, mask, segment_ids = (part(x) for x in make_gaps())
    found: dict[str, Any] = {"positions": part(torch.arange(16)[None])[0]}
    for centering, ids in (("sample", None), ("document", segment_ids)):
        with CollectiveCounter() as counter:
            found[centering] = remit_weights(nll, ref_nll, mask, segment_ids=ids, cp_group=group)
        found[f"collectives {centering}"] = counter.counts.total()
    return found


def on_rank(rank: int, drawn: list[Drawn]) -> dict[int, dict[str, Any]]:
    groups = make_groups(rank)
    return {
        size: {
            "tp": {name: tp_on_rank(make_case(1, **shape), "contiguous", group) for name, shape in TP_CASES.items()},
            "drawn": [tp_on_rank(one.case(), one.layout, group) for one in drawn],
            "head": head_on_rank(group),
            "cp": cp_on_rank(group),
        }
        for size, group in groups.items()
    }


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return draw_cases()


@pytest.fixture(scope="module")
def results(drawn: list[Drawn]) -> list[dict[int, dict[str, Any]]]:
    return run_ranks(WORLD, on_rank, drawn)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TP_CASES)
def test_sharded_nll_matches_specification(results: list[Any], size: int, name: str) -> None:
    check_ranks(make_case(1, **TP_CASES[name]), size, [one[size]["tp"][name] for one in results])


@pytest.mark.parametrize("size", SIZES)
def test_sharded_nll_of_drawn_cases(results: list[Any], drawn: list[Drawn], size: int) -> None:
    assert sum(one.shape["valid_vocab"] <= 3 * one.shape["edge"] for one in drawn) > 3, "shards without a valid column"
    for number, one in enumerate(drawn):
        check_ranks(one.case(), size, [result[size]["drawn"][number] for result in results], str(one))


def check_ranks(case: Case, size: int, ranks: list[dict[str, Any]], what: str = "") -> None:
    want_nll, want_gradient = case.spec()
    print(what)  # shown where an assertion fails
    for one in ranks:
        assert one["unchanged"]
        assert one["repeats"]  # the same bits from run to run
        assert torch.equal(one["nll"], ranks[0]["nll"])  # the same bits everywhere
        assert one["collectives"] == (1 if size > 1 else 0, 0)
    check_nll(ranks[0]["nll"], want_nll, case)
    gradient = torch.cat([one["gradient"] for one in ranks[:size]], dim=-1)
    check_gradient(gradient, want_gradient, case)
    check_no_worse_than_torch(ranks[0]["nll"], gradient, case)


@pytest.mark.parametrize("size", SIZES)
def test_sharded_head(results: list[Any], size: int) -> None:
    hidden, weight, labels = make_head()
    want = spec.token_nll(hidden.double() @ weight.double().t(), labels, valid_vocab=29)
    for one in results:
        found = one[size]["head"]
        assert torch.equal(found["chunks of 64"], found["whole"])
        for chunk_tokens in CHUNKS:
            # Products of 6 terms and the log-sum-exp, at logits of magnitude 10.
            torch.testing.assert_close(found[f"chunks of {chunk_tokens}"].double(), want, rtol=0, atol=1e-5)
            assert found[f"collectives of {chunk_tokens}"] == (1 if size > 1 else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centering", ["sample", "document"])
def test_centring_spans_context_parallel_ranks(results: list[Any], size: int, centering: Any) -> None:
    nll, ref_nll, mask, segment_ids = make_gaps()
    want = spec.remit_weights(nll, ref_nll, mask, segment_ids=segment_ids, centering=centering)
    ids = segment_ids if centering == "document" else None
    one_rank = remit_weights(nll, ref_nll, mask, segment_ids=ids)
    weights = torch.full((3, 16), torch.nan)
    for one in results[:size]:
        found = one[size]["cp"]
        weights[:, found["positions"]] = found[centering]
        assert found[f"collectives {centering}"] == (1 if size > 1 else 0)
    torch.testing.assert_close(weights.double(), want, rtol=0, atol=1.2e-7)  # rounded once to float32 near 1
    assert torch.equal(weights, one_rank)  # integer sums: no bit depends on the cut
