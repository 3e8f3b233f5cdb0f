"""Each family against transformers, in every layout: logits, gradients, and weights out and in again.

transformers' models are the other implementation: its forward, and its autograd for one step of next-token
prediction. Logits agree to 5e-6 on these models of 4 layers and a logit deviation near 0.8; 1e-5 leaves room for
another machine's matrix product. Gradients are compared tensor by tensor, difference over norm.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remit_megatron.hf.mapping import read_shape, tensor_names
from remit_megatron.plan import stage_parameters
from remit_megatron.shape import ModelShape
from tests.hf import tiny
from tests.mcore.families_harness import export_all, import_and_run, on_layouts, prepare_training
from tests.mcore.harness import SAMPLES, STEPS, assemble
from tests.mcore.test_parity import layout
from tests.ranks import run_ranks

NAMES = list(tiny.CASES)
TRAINED = ["olmo2", "smollm3", "youtu"]
LAYOUTS = {
    1: [layout("TP1")],
    2: [
        layout("TP2", tensor=2),
        layout("TP2+SP", tensor=2, sequence=True),
        layout("PP2", pipeline=2),
        layout("CP2", context=2),
    ],
    4: [layout("TP2xPP2", tensor=2, pipeline=2)],
}
ALL = [one for layouts in LAYOUTS.values() for one in layouts]


def fits(layout_name: str, name: str) -> bool:
    return "TP2" not in layout_name or name not in tiny.ONE_GROUP


def saved_pairs() -> list[tuple[str, str]]:
    """Which layouts write which models back: every one for the paper's families, one for each other model."""
    pairs = [(one.name, name) for one in ALL for name in TRAINED]
    for i, name in enumerate(n for n in NAMES if n not in TRAINED):
        names = [one.name for one in ALL if fits(one.name, name)]
        pairs.append((names[i % len(names)], name))
    return pairs


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny.make_model(name, seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folder(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, model in models.items():
        tiny.save(model, root / "hf" / name)
    prepare_training(root, TRAINED)
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """`LAYOUT NAME` and `LAYOUT NAME remit`: what each rank returned."""
    gathered: dict[str, list[dict[str, Any]]] = {}
    for ranks, layouts in LAYOUTS.items():
        run = import_and_run if ranks == 1 else on_layouts  # one spawn less; one rank comes first
        for result in run_ranks(ranks, run, str(folder), layouts, NAMES, saved_pairs(), TRAINED):
            for key, value in result.items():
                gathered.setdefault(key, []).append(value)
    return gathered


def shape_of(model: Any) -> ModelShape:
    config = {k: v for k, v in model.config.to_diff_dict().items()}
    return read_shape({**config, "architectures": [type(model).__name__]}, "config")


def whole_logits(ranks: list[dict[str, Any]]) -> np.ndarray:
    """[SAMPLES, SEQUENCE, padded V] from the slices of the context-parallel ranks."""
    slices = {r["cp"]: r["logits"].numpy() for r in ranks if r["counts"]}
    size = len(slices)
    positions = np.arange(tiny.SEQUENCE).reshape(2 * size, -1)
    out = np.full((tiny.SAMPLES, tiny.SEQUENCE, slices[0].shape[-1]), np.nan)
    for rank, values in slices.items():
        out[:, np.concatenate([positions[rank], positions[2 * size - 1 - rank]])] = values
    return out


@pytest.mark.parametrize("layout_name", [one.name for one in ALL])
def test_logits(layout_name: str, models: dict[str, Any], results: dict[str, Any]) -> None:
    problems = []
    for name, model in models.items():
        if not fits(layout_name, name):
            continue
        with torch.no_grad():
            want = model(tiny.batch(model.config.vocab_size)["tokens"]).logits.numpy()
        got = whole_logits(results[f"{layout_name} {name}"])[..., : want.shape[-1]]
        error = np.abs(got - want).max()
        if not error <= 1e-5:
            problems.append(f"{name}: a logit differs by {error:.1e}")
        assert want.std() > 0.4, "logits without spread would hide an error"
    assert not problems, "\n".join(problems)


def autograd(model: Any) -> dict[str, np.ndarray]:
    """Gradient of the mean NLL over unmasked labels, by transformers' own forward."""
    data = tiny.batch(model.config.vocab_size)
    model.zero_grad()
    logp = model(data["tokens"]).logits.log_softmax(-1)
    nll = -logp.gather(-1, data["labels"][..., None])[..., 0]
    ((nll * data["loss_mask"]).sum() / data["loss_mask"].sum()).backward()
    return {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def fused(grads: dict[str, np.ndarray], names: tuple[str, ...], shape: ModelShape) -> np.ndarray:
    """What a fused parameter holds: written out group by group, apart from the package's own layout functions."""
    parts = [grads[name] for name in names]
    if len(parts) == 3:
        q, k, v = parts
        width, per = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
        rows = []
        for group in range(shape.num_query_groups):
            rows.append(q[group * per * width : (group + 1) * per * width])
            rows += [x[group * width : (group + 1) * width] for x in (k, v)]
        parts = rows
    return np.concatenate(parts)


def checkpoint_names(shape: ModelShape) -> dict[str, str]:
    """Transformer Engine fuses these norms into the linear after them; checkpoints have them by its names."""
    if shape.norm_placement == "post":
        return {}
    renamed = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return renamed if shape.latent else {**renamed, "input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def expected_gradients(model: Any) -> dict[str, np.ndarray]:
    """By the names and stacked layers of a checkpoint."""
    shape, grads = shape_of(model), autograd(model)
    layers: dict[str, list[np.ndarray]] = {}
    out = {}
    for ours, theirs in tensor_names(shape).items():
        value = fused(grads, theirs, shape)
        if not ours.startswith("decoder.layers."):
            out[ours] = value
            continue
        name = ours.split(".", 3)[3]
        for old, new in checkpoint_names(shape).items():
            name = name.replace(old, new, 1) if name.startswith(old) else name
        layers.setdefault(f"decoder.layers.{name}", []).append(value)
    return {**out, **{name: np.stack(values) for name, values in layers.items()}}


def whole_tensors(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Every tensor from the shards of all ranks. A part that several ranks hold must be the same on all of them."""
    out: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, global_shape, offset, prepended, values in rank["gradients"]:
            whole = out.setdefault(name, np.full(global_shape, np.nan))
            sizes = (1,) * prepended + values.shape
            place = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
            values = values.reshape(sizes)
            if not np.isnan(whole[place]).any():
                scale = np.abs(whole[place]).max()
                assert np.abs(whole[place] - values).max() <= 1e-5 * scale, f"{name} differs between ranks"
            whole[place] = values
    return out


@pytest.mark.parametrize("layout_name", [one.name for one in ALL])
def test_gradients(layout_name: str, models: dict[str, Any], results: dict[str, Any]) -> None:
    problems = []
    for name, model in models.items():
        if not fits(layout_name, name):
            continue
        want, got = expected_gradients(model), whole_tensors(results[f"{layout_name} {name}"])
        assert got.keys() == want.keys()
        for key, value in want.items():
            rows = len(value)
            assert np.linalg.norm(value) > 1e-6, f"{name} {key}: no gradient to compare"
            error = np.linalg.norm(got[key][:rows] - value) / np.linalg.norm(value)
            if not error <= 1e-4:
                problems.append(f"{name} {key}: gradient differs by {error:.1e}")
            assert not got[key][rows:].any(), f"{name} {key}: padding has a gradient"
    assert not problems, "\n".join(problems)


def test_parameters_of_a_rank(models: dict[str, Any], results: dict[str, Any]) -> None:
    """What `remit plan` counts is what a rank holds."""
    for one in ALL:
        for name, model in models.items():
            if fits(one.name, name):
                for rank in results[f"{one.name} {name}"]:
                    assert stage_parameters(shape_of(model), one.parallel, rank["stage"]) == rank["parameters"]


def test_remit_steps(results: dict[str, Any]) -> None:
    """Three steps of ReMiT with a reference of another family and width: every layout gives what one rank gives."""
    problems = []
    for name in TRAINED:
        want = results[f"TP1 {name} remit"]
        reference = assemble(want, 1)
        assert reference["weight"][reference["mask"] > 0].std() > 0.1
        for one in ALL[1:]:
            got = results[f"{one.name} {name} remit"]
            for step, (a, b) in enumerate(zip(got[0]["steps"], want[0]["steps"], strict=True)):
                problems += [
                    f"{one.name} {name} step {step} {key}: {a[key]:.7f} for {b[key]:.7f}"
                    for key in b
                    if not np.isclose(a[key], b[key], rtol=3e-5, atol=3e-5 if key == "gap_mean" else 1e-7)
                ]
            tokens = assemble(got, one.parallel.context)
            for key, values in reference.items():
                assert values.shape == (STEPS * SAMPLES, 16)
                error = np.abs(tokens[key] - values) / np.maximum(np.abs(values), 0.5)
                if not error.max() <= 3e-5:
                    problems.append(f"{one.name} {name} {key}: a token differs by {error.max():.1e}")
    assert not problems, "\n".join(problems)


def test_out_again(folder: Path, models: dict[str, Any], results: dict[str, Any]) -> None:
    """Imported, loaded and saved in a layout, exported: the same tensors, bit for bit, that transformers loads."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    pairs = saved_pairs()
    run_ranks(1, export_all, str(folder), pairs)
    for layout_name, name in pairs:
        out, source = folder / "out" / layout_name / name, folder / "hf" / name
        got, want = ({k: v for p in d.glob("*.safetensors") for k, v in load_file(p).items()} for d in (out, source))
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert got[key].dtype == tensor.dtype
            assert torch.equal(got[key], tensor), f"{layout_name} {name}: {key}"
        model, info = AutoModelForCausalLM.from_pretrained(
            out, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        tokens = tiny.batch(model.config.vocab_size)["tokens"]
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens).logits, models[name](tokens).logits)
