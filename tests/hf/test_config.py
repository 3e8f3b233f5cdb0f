"""config.json: both spellings of the RoPE base, class defaults, and everything that is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.errors import UserError
from remit_megatron.hf.config import length_note, with_both_rope_keys
from remit_megatron.hf.mapping import FAMILIES, read_fields, read_shape, tensor_names, tensor_shapes
from remit_megatron.shape import ModelShape
from tests.hf import tiny

FOLDERS = [json.loads(line) for line in (Path(__file__).parent / "published.jsonl").read_text().splitlines()]
"""config.json of published models, and the numbers of their parameters as published where that is known."""
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 700.0,
}
SMOLLM3 = {**LLAMA, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 6}
YOUTU = {
    **LLAMA,
    **tiny.LATENT,
    "model_type": "youtu",
    "architectures": ["YoutuForCausalLM"],
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12}


# Of Llama-3.2-1B, 3B; the 3.1 and 3.3 models have a factor of 8.
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize("name", list(tiny.CASES))
def test_reads_what_transformers_writes(name: str) -> None:
    """A round trip through transformers' own config; its parameter count is the independent side."""
    model = tiny.make_model(name)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    shape = read_shape(config, "config.json")
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
    assert shape.rope_theta == {"llama scaled": 200000.0, "youtu untied yarn 1": 900.0}.get(name, 700.0)
    assert shape.rope_llama3_factor == (32.0 if name == "llama scaled" else None)
    assert ModelShape(**shape.model_dump()) == shape
    names = [theirs for parts in tensor_names(shape).values() for theirs in parts]
    assert sorted(names) == sorted(dict(model.named_parameters()))


def test_features_that_are_switched_off_are_no_features() -> None:
    off = {"quantization_config": None, "num_nextn_predict_layers": 0, "num_local_experts": 0, "use_mrope": False}
    assert read_shape({**LLAMA, **off}, "c") == read_shape(LLAMA, "c")


def test_plain_shapes_stay_as_they_were_on_disk() -> None:
    """Checkpoints from before a trait existed are read, and compare equal."""
    old = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 9,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "kv_channels": 4,
        "vocab_size": 11,
        "tied_embeddings": True,
        "rope_theta": 1e4,
        "norm_epsilon": 1e-5,
    }
    assert ModelShape(**old).model_dump() == old


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 700},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": None},
        {"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}},
        {"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 700}},
    ],
)
def test_rope_base_in_every_spelling(rope: dict[str, Any]) -> None:
    assert read_shape({**LLAMA, **rope}, "c").rope_theta == 700.0


def test_defaults_are_those_of_the_classes() -> None:
    assert not read_shape(LLAMA, "c").tied_embeddings
    smol = read_shape(SMOLLM3, "c")
    assert smol.tied_embeddings
    assert smol.no_rope_layers == (3,)
    assert read_shape({**SMOLLM3, "no_rope_layer_interval": 2}, "c").no_rope_layers == (1, 3, 5)
    assert read_shape({**SMOLLM3, "no_rope_layers": [0, 1, 1, 1, 1, 0]}, "c").no_rope_layers == (0, 5)
    assert read_shape(YOUTU, "c").tied_embeddings
    assert read_shape(YOUTU, "c").kv_channels == 16
    assert read_shape(QWEN3, "c").kv_channels == 12


COMMON_4: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    # Keys as the published folders have them; parameters as published (Youtu-LLM: counted by hand, 1.96B in print).
    "OLMo-2-0425-1B": (
        1_484_916_736,
        {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "hidden_size": 2048}
        | {"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"rms_norm_eps": 1e-06, "rope_theta": 500000, "rope_scaling": None, "tie_word_embeddings": False}
        | {"attention_bias": False, "max_position_embeddings": 4096, "pad_token_id": 100277},
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048}
        | {"intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4}
        | {"rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "rope_scaling": None, "attention_bias": False}
        | {"mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2}
        | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "sliding_window": None}
        | {"use_sliding_window": False, "max_position_embeddings": 65536, "pad_token_id": 128004},
    ),
    "Youtu-LLM-2B with its own code": (
        1_961_560_064,
        {"model_type": "youtu_llm", "architectures": ["YoutuForCausalLM"], "vocab_size": 128256, "hidden_size": 2048}
        | {"auto_map": {"AutoConfig": "configuration_youtu.YoutuConfig"}, "intermediate_size": 6144}
        | {"num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 1536}
        | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64}
        | {"rms_norm_eps": 1e-06, "rope_theta": 1600000, "rope_interleave": True, "tie_word_embeddings": True}
        | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 131072},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896}
        | {"intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 24}
        | {"use_mrope": False, "use_sliding_window": False, "tie_word_embeddings": True},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024}
        | {"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False}
        | {"sliding_window": None, "max_window_layers": 28, "use_sliding_window": False, "tie_word_embeddings": True},
    ),
    "Llama-2-7b": (
        6_738_415_616,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096}
        | {"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"_name_or_path": "x", "max_length": 4096, "do_sample": True, "temperature": 0.9, "top_p": 0.6}
        | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None}
        | {"tie_word_embeddings": False, "attention_bias": False, "max_position_embeddings": 4096},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048}
        | {"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "mlp_bias": False}
        | {"pretraining_tp": 1, "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu"}
        | {"max_position_embeddings": 131072},
    ),
}


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case["model"])
def test_configs_of_published_folders(case: dict[str, Any]) -> None:
    """Key for key as published: read, with the parameters that the model is known to have, or refused by name."""
    if "refused" in case:
        with pytest.raises(UserError) as error:
            read_shape(case["config"], "c")
        assert case["refused"] in str(error.value)
        return
    shape = read_shape(case["config"], "c")
    assert shape.num_parameters() == (case["parameters"] or shape.num_parameters())
    assert shape.rope_theta == case["config"].get("rope_theta", 10_000)
    assert set(tensor_shapes(shape)) == {name for parts in tensor_names(shape).values() for name in parts}


@pytest.mark.parametrize("name", list(tiny.CASES))
def test_shapes_of_tensors(name: str) -> None:
    """Computed from sizes alone, against those of transformers."""
    model = tiny.make_model(name)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    assert tensor_shapes(read_shape(config, "c")) == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {"rope_type": "default", "rope_theta": 900.0}}])
def test_rope_base_is_what_transformers_takes(rope: dict[str, Any]) -> None:
    """Without one as Llama 2 is published, and inside rope_scaling."""
    from transformers import LlamaConfig

    plain = without(LLAMA, "rope_theta")
    theirs = LlamaConfig(**{k: v for k, v in plain.items() if k not in ("model_type", "architectures")}, **rope)
    assert read_shape({**plain, **rope}, "c").rope_theta == theirs.rope_parameters["rope_theta"]


def test_harmless_keys_of_older_savers() -> None:
    """Of transformers 4.46 to 4.51, of TRL, and of what PretrainedConfig wrote before."""
    more = {
        "_attn_implementation_autoset": True,
        "neftune_noise_alpha": 5,
        "unk_token_id": 0,
        "finetuning_task": None,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "num_logits_to_keep": 0,
        "diversity_penalty": 0.0,
        "cross_attention_hidden_size": None,
        "_model_name_or_path": "x",
        "tf_legacy_loss": False,
        "rope_interleaved": False,
    }
    assert read_shape({**LLAMA, **more}, "c") == read_shape(LLAMA, "c")


def test_a_key_that_the_user_answers_for() -> None:
    odd = {**LLAMA, "clip_qkv": None, "use_muon": True}
    shape, fields = read_fields(odd, "c", ["use_muon", "clip_qkv", "hidden_size", "absent"])
    assert shape == read_shape(LLAMA, "c")
    assert fields.allowed_keys() == ["clip_qkv", "use_muon"], "only those that nothing else reads"
    with pytest.raises(UserError, match="unknown key clip_qkv = null"):
        read_shape(odd, "c", ["use_muon"])


@pytest.mark.parametrize("length", [-1, 0, "4096", 2.5])
def test_a_length_that_other_programs_cannot_use(length: Any) -> None:
    assert "max_position_embeddings = " in (length_note({"max_position_embeddings": length}) or "")
    assert length_note({"max_position_embeddings": 4096}) is None
    assert length_note({}) is None


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs(name: str) -> None:
    parameters, config = PUBLISHED[name]
    assert read_shape({**COMMON_4, **config}, "c").num_parameters() == parameters


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


REFUSED = {
    "mixture of experts": {**LLAMA, "num_local_experts": 8},
    "quantised": {**LLAMA, "quantization_config": {"bits": 4}},
    'model_type "mamba"': {**LLAMA, "model_type": "mamba"},
    "only LlamaForCausalLM": {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
    "attention_bias = true": {**LLAMA, "attention_bias": True},
    "mlp_bias = true": {**LLAMA, "mlp_bias": True},
    'hidden_act = "gelu"': {**LLAMA, "hidden_act": "gelu"},
    "RoPE scaling 'llama3' with low_freq_factor = null": {
        **LLAMA,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    },
    "RoPE scaling 'llama3' with original_max_position_embeddings = 4096": {
        **LLAMA,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096},
    },
    'rope_scaling.factor = "8" is no number from 1': {**LLAMA, "rope_scaling": {**LLAMA3, "factor": "8"}},
    "rope_parameters and rope_scaling disagree": {
        **LLAMA,
        "rope_scaling": LLAMA3,
        "rope_parameters": {**LLAMA3, "factor": 8.0, "rope_theta": 700.0},
    },
    "RoPE scaling 'llama3' in latent attention": {**YOUTU, "rope_scaling": LLAMA3},
    'RoPE scaling "yarn" (rope_scaling)': {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    'RoPE scaling "linear" (rope_parameters)': {
        **LLAMA,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
    },
    "disagree": {**LLAMA, "rope_parameters": {"rope_theta": 701.0}},
    "missing key rope_theta": without(QWEN3, "rope_theta"),
    "missing key hidden_size": without(LLAMA, "hidden_size"),
    "missing key head_dim": without(QWEN3, "head_dim"),
    "unknown key clip_qkv = 8.0": {**LLAMA, "clip_qkv": 8.0},
    "unknown keys clip_qkv = 8.0, logit_scale = 0.5": {**LLAMA, "logit_scale": 0.5, "clip_qkv": 8.0},
    "rope_interleaved = true: an interleaved rotary embedding": {**LLAMA, "rope_interleaved": True},
    "unknown key rope_scaling.short_factor = [1.0]": {
        **LLAMA,
        "rope_scaling": {"rope_type": "default", "short_factor": [1.0]},
    },
    "rope_theta = 700 and rope_scaling.rope_theta = 900 disagree": {
        **LLAMA,
        "rope_scaling": {"rope_type": "default", "rope_theta": 900.0},
    },
    "a partial rotary embedding": {**LLAMA, "partial_rotary_factor": 0.5},
    "rope_theta = NaN is no number": {**LLAMA, "rope_theta": float("nan")},
    "rope_theta = Infinity is no number": {**LLAMA, "rope_theta": float("inf")},
    "rope_theta = 0.5 is no number from 1": {**LLAMA, "rope_theta": 0.5},
    "rope_scaling.factor = NaN is no number": {**LLAMA, "rope_scaling": {**LLAMA3, "factor": float("nan")}},
    "with low_freq_factor = true": {**LLAMA, "rope_scaling": {**LLAMA3, "low_freq_factor": True}},
    "rms_norm_eps = 1.0 is no number": {**LLAMA, "rms_norm_eps": 1.0},
    "rms_norm_eps = -Infinity is no number": {**LLAMA, "rms_norm_eps": float("-inf")},
    "num_hidden_layers = 1000000000: no model has more": {**SMOLLM3, "num_hidden_layers": 10**9},
    "vocab_size = 1000000000000000000": {**LLAMA, "vocab_size": 10**18},
    "rope_scaling = [1] is no object": {**LLAMA, "rope_scaling": [1]},
    'model_type ["llama"] is not supported': {**LLAMA, "model_type": ["llama"]},
    "model_type null is not supported": {**LLAMA, "model_type": None},
    "only full_attention is supported": {**LLAMA, "layer_types": [["full_attention"]]},
    "no_rope_layers must hold a 0 or 1 for each": {**SMOLLM3, "no_rope_layers": 7},
    'vocab_size = "61"': {**LLAMA, "vocab_size": "61"},
    "does not divide by num_key_value_heads": {**LLAMA, "num_key_value_heads": 3},
    "hidden_size = 30 does not divide": {**LLAMA, "hidden_size": 30},
    "use_mrope = true": {**LLAMA, "use_mrope": True},
    "multi-token prediction (num_nextn_predict_layers)": {**YOUTU, "num_nextn_predict_layers": 1},
    "use_sliding_window = true": {**SMOLLM3, "use_sliding_window": True},
    "not a sliding window": {**SMOLLM3, "layer_types": ["full_attention", "sliding_attention"]},
    "no_rope_layers must hold": {**SMOLLM3, "no_rope_layers": [1, 1]},
    "rope_interleave = false": {**YOUTU, "rope_interleave": False},
    "missing key q_lora_rank": without(YOUTU, "q_lora_rank"),
    "q_lora_rank = null: latent attention with whole queries": {**YOUTU, "q_lora_rank": None},
    "num_key_value_heads must equal": {**YOUTU, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_refused_by_name(message: str) -> None:
    with pytest.raises(UserError) as error:
        read_shape(REFUSED[message], "config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("config.json: ")
    assert "\n" not in str(error.value)


def test_both_rope_keys() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}, "x": 1}
    assert with_both_rope_keys(new, 5.0) == {
        "rope_theta": 5.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "x": 1,
    }
    old = {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 1.0}}
    both = with_both_rope_keys(old, 5.0)
    assert both["rope_parameters"] == {"rope_type": "yarn", "factor": 1.0, "rope_theta": 5.0}
    assert both["rope_scaling"] == old["rope_scaling"]
    stretched = with_both_rope_keys({"rope_parameters": {**LLAMA3, "rope_theta": 1.0}}, 5.0)
    assert stretched == {"rope_theta": 5.0, "rope_parameters": {**LLAMA3, "rope_theta": 5.0}, "rope_scaling": LLAMA3}
    inside = with_both_rope_keys({"rope_scaling": {"rope_type": "default", "rope_theta": 1.0}}, 5.0)
    assert "rope_theta" not in inside["rope_scaling"], "transformers 5 would take that one"


def test_every_family_has_a_tiny_model() -> None:
    kinds = {kind.lower() for kind, _ in tiny.CASES.values()}
    assert kinds == set(FAMILIES)
