"""Hugging Face folders: config.json, tokenizer.json, the index and the safetensors files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

import remit_megatron.convert.pair
import remit_megatron.convert.weights  # noqa: F401 - here, and so by no fork
from remit_megatron.convert.weights import check_finite
from remit_megatron.hf.folder import HFFolder, check_tensors
from remit_megatron.hf.mapping import read_shape
from tests.data_prep import tokenizers
from tests.data_prep.tokenizers import TEXTS
from tests.fuzz.framework import Target, register

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 700,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "attention_bias": False,
    "bos_token_id": 1,
}


def prepare_pair(folder: Path) -> None:
    """A base and a reference; the reference is broken."""
    tokenizers.save("gpt2", folder / "base")
    tokenizers.save("gpt2", folder / "reference")
    for name in ("base", "reference"):
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def tokenizer_only(folder: Path, valid: Path) -> str | None:
    """Both must be tokenizers, and give the same ids: by the library itself."""
    ids = []
    for name in ("base", "reference"):
        content = json.loads((folder / name / "tokenizer.json").read_bytes())
        content |= {"truncation": None, "padding": None}  # left by a last call; no id depends on them
        try:
            tokenizer = Tokenizer.from_str(json.dumps(content))
        except BaseException as error:  # noqa: BLE001 - the library's panics
            return f"accepted a tokenizer that the library refuses: {str(error)[:100]}"
        ids.append([tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS])
    return None if ids[0] == ids[1] else "accepted as the same tokenizer, but ids differ"


def config(folder: Path, valid: Path) -> str | None:
    """Numbers that a model can have; what is not known is not accepted."""
    found = json.loads((folder / "reference" / "config.json").read_bytes())
    if extra := found.keys() - CONFIG.keys() - KNOWN:
        return f"accepted unknown keys {sorted(extra)[:3]}"
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        value = found.get(key)
        if type(value) is not int or not 0 < value < 1 << 40:
            return f"accepted {key} = {value!r:.60}"
    for key in ("rms_norm_eps", "rope_theta"):
        value = found.get(key, 1e-6)
        if type(value) not in (int, float) or not (0 < value < math.inf):
            return f"accepted {key} = {value!r:.60}"
    return None


KNOWN = frozenset({"rope_parameters", "head_dim", "dtype"})


def prepare_folder(folder: Path) -> None:
    """Two shards and an index."""
    hf = folder / "hf"
    hf.mkdir()
    small = {**CONFIG, "vocab_size": 11, "num_hidden_layers": 1}
    (hf / "config.json").write_text(json.dumps(small))
    generator = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (11, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names, files = list(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[:5], names[5:]), strict=True):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, hf / file)
    places = dict.fromkeys(names[:5], files[0]) | dict.fromkeys(names[5:], files[1])
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read_folder() -> None:
    """As an import reads it, without the model: every tensor, by its name, into one file."""
    folder = HFFolder(Path("hf"))
    check_tensors(folder, read_shape(folder.config, folder.path / "config.json"))
    folder.content_key()
    found = {}
    for name, tensor in folder:
        check_finite(folder, name, tensor)
        found[name] = tensor.numpy()
    np.savez("found.npz", **found)


def weights(folder: Path, valid: Path) -> str | None:
    """What was read is what safetensors reads, is finite, and has the sizes that config.json says."""
    found = np.load(folder / "found.npz")
    wanted: dict[str, Any] = {}
    places = json.loads((folder / "hf/model.safetensors.index.json").read_bytes())["weight_map"]
    for file in sorted(set(places.values())):
        try:
            wanted |= safetensors.numpy.load_file(folder / "hf" / file)
        except Exception as error:  # noqa: BLE001
            return f"accepted a file that safetensors refuses: {error}"
    if set(found) != set(wanted):
        return f"other tensors: {sorted(set(found) ^ set(wanted))[:3]}"
    for name, value in wanted.items():
        if not np.isfinite(value).all():
            return f"accepted {name}, which is not finite"
        if not np.array_equal(found[name], value):
            return f"read other numbers of {name}"
    sizes = json.loads((folder / "hf" / "config.json").read_bytes())
    if wanted["model.embed_tokens.weight"].shape != (sizes["vocab_size"], sizes["hidden_size"]):
        return "accepted sizes that are not those of config.json"
    return None


CHECK = ("convert", "check", "base", "reference")
register(Target("model.config", prepare_pair, ("reference/config.json",), CHECK, config, ("base/*",), share=2))
register(Target("model.tokenizer", prepare_pair, ("reference/tokenizer.json",), CHECK, tokenizer_only, ("base/*",)))
register(Target("model.folder", prepare_folder, ("hf/*.safetensors", "hf/*.json"), read_folder, weights, share=3))
