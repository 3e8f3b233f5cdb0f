"""Tiny random models of every family, made by transformers: the other side of every comparison here.

Sizes are chosen to break what is only right for the usual ones: feed-forward sizes with an odd factor, one KV head or
as many as query heads, heads wider or narrower than hidden / heads, vocabularies that tensor parallelism has to pad.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

VOCAB, SEQUENCE, SAMPLES = 61, 16, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 54, "num_hidden_layers": 4}
# No padding token: transformers keeps gradients from its row, and 5.15 loads Youtu's row as zeros.
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 700.0}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2", {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "olmo2 tied grouped": ("Olmo2", {**WIDE, "tie_word_embeddings": True, "intermediate_size": 70}),
    "smollm3": ("SmolLM3", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "smollm3 untied list": (
        "SmolLM3",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "no_rope_layers": [0, 1, 1, 0]}
        | {"tie_word_embeddings": False, "vocab_size": 64},
    ),
    "youtu": ("Youtu", LATENT),
    "youtu untied yarn 1": (
        "Youtu",
        {**LATENT, "tie_word_embeddings": False, "v_head_dim": 6, "rms_norm_eps": 1e-5}
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 900.0,
                "factor": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama tied one group": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
    ),
    # Half of its pairs turn in 2,048 to 8,192 tokens or more slowly.
    "llama scaled": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 200000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "qwen2": ("Qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", WIDE),
    "qwen3 tied": (
        "Qwen3",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
    ),
}
ONE_GROUP = [name for name, (_, changes) in CASES.items() if changes.get("num_key_value_heads") == 1]
"""No tensor parallelism: a rank would have no KV head."""


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model, float32, eager attention, with weights that no symmetry hides."""
    import transformers

    kind, own = CASES[name]
    settings = {**SIZES, **TOKENS, "rope_parameters": dict(ROPE), **own, **changes}
    config = getattr(transformers, f"{kind}Config")(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Biases too: a norm's weight is the only vector around 1.
            parameter.copy_(0.14 * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
    return model


def save(model: Any, folder: Path, max_shard_bytes: int = 20_000) -> Path:
    """As transformers writes it, in several shards."""
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    return folder


def batch(vocab_size: int = VOCAB) -> dict[str, torch.Tensor]:
    """Two samples with ragged masks, [SAMPLES, SEQUENCE]."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(vocab_size, (SAMPLES, SEQUENCE + 1), generator=generator)
    mask = (torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.7).float()
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask}


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
