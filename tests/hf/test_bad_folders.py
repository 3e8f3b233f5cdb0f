"""Folders that are refused by `remit convert`, each in one line that names the cause."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.hf import tiny
from tests.hf.converting import Outcome, commands, make_models
from tests.hf.damage import (
    add,
    drop,
    edit_header,
    edit_index,
    halve,
    one_file,
    overlap,
    store_twice,
    to_bin_only,
    truncate,
    write_header,
)
from tests.ranks import run_ranks

BAD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "missing, though model.safetensors.index.json names it": (
        "llama",
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
    ),
    "truncated or damaged": ("llama", truncate),
    "no safetensors file, or truncated": (
        "llama",
        lambda folder: sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\0\1"),
    ),
    "lists model.layers.9.mlp.up_proj.weight": (
        "llama",
        lambda f: edit_index(f, lambda m: m.update({"model.layers.9.mlp.up_proj.weight": sorted(m.values())[0]})),
    ),
    "leaves out model.norm.weight": ("llama", lambda f: edit_index(f, lambda m: m.pop("model.norm.weight"))),
    "ties the embeddings, but lm_head.weight differs": ("smollm3", add("lm_head.weight", (61, 32))),
    "lm_head.weight is missing": ("llama", drop("lm_head.weight")),
    "1 tensors are missing (model.layers.2.self_attn.k_proj.weight) and 0": (
        "llama",
        drop("model.layers.2.self_attn.k_proj.weight"),
    ),
    "0 tensors are missing (none) and 1 are unknown (model.layers.0.self_attn.q_proj.bias)": (
        "llama",
        add("model.layers.0.self_attn.q_proj.bias", (32,)),
    ),
    "lm_head.weight is [61, 32], config.json asks for [62, 32]": (
        "llama",
        lambda folder: tiny.edit_config(folder, vocab_size=62),
    ),
    "model.layers.1.mlp.up_proj.weight has 1 numbers that are not finite, the first is nan at [3, 7]": (
        "llama",
        lambda folder: one_file(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].__setitem__(7, torch.nan)),
    ),
    "model.norm.weight has 2 numbers that are not finite, the first is -inf at [4]": (
        "llama",
        lambda folder: one_file(folder, lambda t: t["model.norm.weight"][4:6].fill_(-torch.inf)),
    ),
    'model.norm.weight is in "../model.safetensors", which is no file name': (
        "llama",
        lambda folder: edit_index(folder, lambda places: places.update({"model.norm.weight": "../model.safetensors"})),
    ),
    "which is no file name: an index names files of its own folder": (
        "llama",
        lambda folder: edit_index(folder, lambda places: places.update({"model.norm.weight": "m" * 300})),
    ),
    "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors, with other values": (
        "llama",
        lambda folder: store_twice(folder, 1.5),
    ),
    "lm_head.weight is [61, 32], config.json asks for [6100, 32]": (
        "llama",
        lambda folder: tiny.edit_config(folder, vocab_size=6100),
    ),
    "tensors are fewer than 9000 layers have, which config.json asks for: model.layers.4.": (
        "llama",
        lambda folder: tiny.edit_config(folder, num_hidden_layers=9000),
    ),
    "no safetensors file: its header: nested deeper": (
        "llama",
        lambda folder: write_header(folder, b"[" * 5000 + b"]" * 5000),
    ),
    "no safetensors file: its header does not describe tensors": (
        "llama",
        lambda folder: edit_header(folder, lambda header: next(iter(header.values())).update(shape=[-1, True])),
    ),
    "float16 weights: choose --dtype": ("llama", halve(torch.float16)),
    "types bfloat16, float32: choose one with --dtype": ("llama", halve(torch.bfloat16, 0.5)),
    'is of type "F64"': ("llama", halve(torch.float64)),
    "has no weight_map from tensors to files": (
        "llama",
        lambda folder: edit_index(folder, lambda places: places.update({"model.norm.weight": 7})),
    ),
    "its header does not describe tensors": (
        "llama",
        lambda folder: edit_header(folder, lambda header: next(iter(header.values())).pop("shape")),
    ),
    "damaged: Error while deserializing header": ("llama", lambda folder: edit_header(folder, overlap)),
    "pytorch_model.bin is not read": ("llama", to_bin_only),
    "which transformers loads, and model.safetensors.index.json, which names other files": (
        "llama",
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
    ),
    "adapter_config.json lies in it": ("llama", lambda folder: (folder / "adapter_config.json").write_text("{}")),
    "mixture of experts": ("llama", lambda folder: tiny.edit_config(folder, num_local_experts=8)),
    "config.json: no valid JSON": ("llama", lambda folder: (folder / "config.json").write_text("{")),
}


def prepare_bad(root: Path) -> list[list[str]]:
    lines = []
    for i, (name, damage) in enumerate(BAD.values()):
        folder = root / f"bad{i}"
        shutil.copytree(root / name, folder)
        damage(folder)
        lines.append(["convert", "import", str(folder), str(root / "out" / f"bad{i}")])
    return lines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def refusals(root: Path) -> list[Outcome]:
    return run_ranks(1, commands, prepare_bad(root))[0]


@pytest.mark.parametrize("message", list(BAD))
def test_bad_folder(message: str, root: Path, refusals: list[Outcome]) -> None:
    code, out, err = refusals[list(BAD).index(message)]
    assert code == 2, err
    assert message in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert not [p for p in (root / "out").iterdir() if f"bad{list(BAD).index(message)}" in p.name]
