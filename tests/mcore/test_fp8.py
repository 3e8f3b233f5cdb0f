"""The reference's linears in FP8: each against its float64 product, the whole model against itself, the refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore.groups import destroy_groups
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import BUILD, SEQUENCE, STUDENT, randomise
from tests.ranks import run_ranks
from tests.train import runs

# Every linear's sides are multiples of 16 x TP2.
SHAPE = STUDENT.model_copy(update={"ffn_hidden_size": 64, "qkv_bias": True})


def product_errors(rank: int) -> dict[str, float]:
    """Each kind of linear of a layer: its largest error against float64, over what rounding both sides may cause."""
    activate("cpu")
    from remit_megatron.mcore.fp8 import quantise
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks

    initialize_groups(Parallel(), seed=1)
    chunks, _ = build_chunks(SHAPE, Parallel(), BUILD, max_sequence_length=SEQUENCE, scorer=True)
    randomise(chunks)
    products = quantise(chunks, BUILD.device, BUILD.dtype)
    assert len(products) == 4 * SHAPE.num_layers
    layer = chunks[0].decoder.layers[0]
    linears = {
        "qkv": layer.self_attention.linear_qkv,
        "proj": layer.self_attention.linear_proj,
        "fc1": layer.mlp.linear_fc1,
        "fc2": layer.mlp.linear_fc2,
    }
    generator, errors = torch.Generator().manual_seed(0), {}
    for name, linear in linears.items():
        x = torch.randn(5, 2, linear.weight.size(1), generator=generator)
        out, bias = linear(x)
        out = out if bias is None else out + bias
        exact = x.double() @ linear.weight.double().t()
        if name == "qkv":
            exact = exact + linear.bias.double()
        # Each factor is off by 2^-4 at most, so a product by 2^-3 and a little.
        bound = 0.13 * (x.double().abs() @ linear.weight.double().abs().t())
        errors[name] = float(((out.double() - exact).abs() / bound).max())
        errors[name + " rms"] = float((out.double() - exact).norm() / exact.norm())
    destroy_groups()
    return errors


def test_products() -> None:
    (errors,) = run_ranks(1, product_errors)
    for name, error in errors.items():
        # The rms of 4-bit rounding of both factors is 2^-4 / sqrt(3) x sqrt(2) = 0.05 at most.
        low, high = (0.005, 0.06) if name.endswith("rms") else (0.0, 1.0)
        assert low < error < high, f"{name}: {error}"


def nll_in_layouts(rank: int, folder: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's NLL in FP8, and with FP8 disabled."""
    activate("cpu")
    from remit_megatron.mcore import dist_checkpoint, fp8
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks

    found = []
    for layout in layouts:
        parallel = Parallel(**{"distributed_optimizer": False, **layout})
        initialize_groups(parallel, seed=1)
        chunks, _ = build_chunks(SHAPE, parallel, BUILD, max_sequence_length=SEQUENCE, scorer=True)
        if Path(folder, "model").exists():
            dist_checkpoint.load_model(Path(folder, "model"), chunks)
        else:
            randomise(chunks)
            Path(folder, "model").mkdir()
            dist_checkpoint.save(Path(folder, "model"), chunks, None)
        products = fp8.quantise(chunks, BUILD.device, BUILD.dtype)
        text = torch.randint(1, 61, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(SEQUENCE).expand(2, -1)

        def nll(model: Any = chunks[0], text: Any = text, positions: Any = positions) -> torch.Tensor:
            return model(text[:, :-1], positions, None, labels=text[:, 1:].contiguous())

        with torch.no_grad():
            low = nll()
            with fp8.disabled(products):
                exact = nll()
            assert torch.equal(nll(), low)
        found.append({"low": low, "exact": exact})
        destroy_groups()
    return found


def test_model_in_layouts(tmp_path: Path) -> None:
    """FP8 changes scores a little, and sharding changes them by less: rows of a shard have other scales."""
    ((one,),) = run_ranks(1, nll_in_layouts, str(tmp_path), [{}])
    two = run_ranks(2, nll_in_layouts, str(tmp_path), [{"tensor": 2}, {"tensor": 2, "sequence": True}])
    error = (one["low"] - one["exact"]).abs()
    assert 1e-4 < float(error.mean()) < 0.3
    for found in two[0] + two[1]:
        assert torch.allclose(found["exact"], one["exact"], atol=1e-4)
        assert 1e-5 < float((found["low"] - one["exact"]).abs().mean()) < 0.3
    assert torch.equal(two[0][0]["low"], two[1][0]["low"]), "all tensor-parallel ranks hold the same scores"


def refusals(rank: int) -> list[str]:
    activate("cpu")
    from remit_megatron.mcore import fp8
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks

    initialize_groups(Parallel(), seed=1)
    messages = []
    for shape in (STUDENT.model_copy(update={"ffn_hidden_size": 40}), None):
        chunks = [torch.nn.Linear(16, 16)]
        if shape:
            chunks, _ = build_chunks(shape, Parallel(), BUILD, max_sequence_length=SEQUENCE, scorer=True)
        with pytest.raises(UserError) as caught:
            fp8.quantise(chunks, BUILD.device, BUILD.dtype)
        messages.append(str(caught.value))
    destroy_groups()
    return messages


def test_refusals() -> None:
    ((sizes, no_linear),) = run_ranks(1, refusals)
    assert "linear_fc2 is 32 x 40 on each rank" in sizes
    assert "model.implementation = 'local'" in no_linear


def test_a_run_reports_the_error(tmp_path: Path) -> None:
    """With FP8 the run says what it does to scores and weights, trains, and finds the reference unchanged."""
    runs.make_data(tmp_path)
    short = {"schedule": {"train_tokens": 4 * 128, "warmup_tokens": 128}}
    model = {"model": {"hidden_size": 32, "ffn_hidden_size": 64}}
    reference = {"path": str(tmp_path / "base"), "precision": "fp8"}
    recipes = [
        runs.settings(tmp_path, "base", **short, **model),
        runs.remit(tmp_path, "exact", **short, **model),
        runs.remit(tmp_path, "low", **short, **model, reference=reference),
    ]
    (outcomes,) = run_ranks(1, runs.train_all, recipes)
    assert outcomes == [(0, "")] * 3
    log = (tmp_path / "low/log.txt").read_text()
    assert "reference in fp8: error of ref_nll" in log
    assert "reference in fp8: error of weight" in log
    assert "fp8" not in (tmp_path / "exact/log.txt").read_text()
    exact, low = (runs.metrics(tmp_path, name)[0] for name in ("exact", "low"))
    assert exact["nll"] == low["nll"]
    assert 0 < abs(exact["ref_nll"] - low["ref_nll"]) < 0.05
