"""config.json: read key by key, so that nothing that could change the model goes unnoticed."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.outside import quote, read_object

IGNORED = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_from_model_config",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "embedding_initializer_range",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "name_or_path",
        "neftune_noise_alpha",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    )
)
"""Keys that say nothing of the function from tokens to logits."""
GENERATION = frozenset(
    (
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_logits",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    )
)
"""How text is drawn from the logits. Configs of transformers 4 hold some of these."""
REFUSED = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "a quantised checkpoint",
    "num_nextn_predict_layers": "multi-token prediction",
    "vision_config": "a multimodal model",
    "text_config": "a multimodal model",
}
MISSING = object()
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000


def shown(value: Any) -> str:
    """A value as a message repeats it: JSON on one line, cut."""
    return quote(json.dumps(value))


class Fields:
    """The keys of a config.json, each read once. `where` names the file in messages.

    allowed: keys that the user has said change nothing, though the program does not know them.
    """

    def __init__(self, values: dict[str, Any], where: str, allowed: Collection[str] = ()):
        self.values = values
        self.where = where
        self.allowed = set(allowed)
        self.read: set[str] = set(IGNORED | GENERATION)

    def take(self, key: str, default: Any = MISSING) -> Any:
        """A value, or the default of the model's class in transformers. Raises UserError where a key is missing."""
        self.read.add(key)
        if key in self.values:
            return self.values[key]
        if default is MISSING:
            raise UserError(f"{self.where}: missing key {key}")
        return default

    def size(self, key: str, default: Any = MISSING, largest: int = MAX_SIZE) -> int:
        """A positive integer; null means the default."""
        value = self.take(key, default)
        if value is None and default is not MISSING:
            value = default
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key} = {shown(value)} is no positive integer")
        if value > largest:
            raise UserError(f"{self.where}: {key} = {shown(value)}: no model has more than {largest:,}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise UserError(f"{self.where}: {key} = {shown(value)} is neither true nor false")
        return value

    def number(self, key: str, lowest: float, highest: float) -> float:
        """A finite number in a range outside of which no model is."""
        return self.check_number(key, self.take(key), lowest, highest)

    def check_number(self, name: str, value: Any, lowest: float, highest: float) -> float:
        if type(value) not in (int, float) or not lowest <= value <= highest or not math.isfinite(value):
            raise UserError(f"{self.where}: {name} = {shown(value)} is no number from {lowest:g} to {highest:g}")
        return float(value)

    def block(self, key: str) -> dict[str, Any]:
        """A value that is an object; absent or null means an empty one."""
        value = self.take(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} = {shown(value)} is no object")
        return value

    def expect(self, key: str, wanted: Any, what: str) -> None:
        """Raise UserError naming `what` is not supported, unless the key is absent or has the wanted value."""
        value = self.take(key, wanted)
        if value != wanted:
            raise UserError(f"{self.where}: {key} = {shown(value)}: {what} is not supported")

    def finish(self) -> None:
        """Raise UserError naming every key that nobody has read and the user has not allowed."""
        unknown = sorted(self.values.keys() - self.read - self.allowed)
        if unknown:
            names = ", ".join(f"{quote(key, 60)} = {quote(json.dumps(self.values[key]), 60)}" for key in unknown)
            keys, they = ("keys", "they are") if len(unknown) > 1 else ("key", "it is")
            raise UserError(
                f"{self.where}: unknown {keys} {names}: what may change the model's output is refused; if {they} "
                "harmless, say so with --allow-key NAME of convert import"
            )

    def allowed_keys(self) -> list[str]:
        """Those of the allowed keys that the file has and nothing reads: what rests on the user's word."""
        return sorted(self.allowed & (self.values.keys() - self.read))


LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Of every published Llama 3; Megatron-Core has them as constants."""
ROPE_KEYS = frozenset(
    (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    )
)
"""Of `rope_parameters` and `rope_scaling`, with any type of scaling."""
THETA_RANGE = (1.0, 1e12)
FACTOR_RANGE = (1.0, 1e6)


def rope(fields: Fields, default_theta: float | None = None) -> tuple[float, float | None]:
    """The base of the rotary embedding, and the factor of Llama 3's scaling where it has that.

    From `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4), or several of them; transformers 5
    reads a base inside `rope_scaling` too. default_theta: of the class, where published configs leave the base out.
    Raises UserError when they disagree, or when positions are scaled in another way.
    """
    blocks = {key: fields.block(key) for key in ("rope_parameters", "rope_scaling")}
    thetas = {"rope_theta": fields.take("rope_theta", None)}
    factors = {key: _scaling(fields, key, block) for key, block in blocks.items() if block}
    if len(set(factors.values())) > 1:
        raise UserError(f"{fields.where}: rope_parameters and rope_scaling disagree: correct one of them")
    fields.expect("partial_rotary_factor", 1.0, "a partial rotary embedding")
    thetas |= {f"{key}.rope_theta": block.get("rope_theta") for key, block in blocks.items()}
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    found = {name: fields.check_number(name, theta, *THETA_RANGE) for name, theta in given.items()}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} = {theta:g}" for name, theta in found.items())
        raise UserError(f"{fields.where}: {said} disagree: correct one of them")
    theta = next(iter(found.values()), default_theta)
    if theta is None:
        raise UserError(f"{fields.where}: missing key rope_theta (or rope_parameters.rope_theta)")
    return theta, next(iter(factors.values()), None)


def _scaling(fields: Fields, key: str, block: dict[str, Any]) -> float | None:
    """The factor of Llama 3's scaling in a block, or None. Raises UserError for any other that changes positions."""
    unknown = sorted(block.keys() - ROPE_KEYS)
    if unknown:
        raise UserError(
            f"{fields.where}: unknown key {key}.{unknown[0]} = {shown(block[unknown[0]])}: what may change the model's "
            "output is refused"
        )
    kind = block.get("rope_type", block.get("type", "default"))
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{fields.where}: {key}: a partial rotary embedding is not supported")
    if kind == "llama3":
        return _llama3_factor(fields, key, block)
    # At a factor of 1 YaRN's frequencies and scale are those of the plain embedding.
    identity = kind == "yarn" and block.get("factor") == 1.0 and block.get("attention_factor") in (None, 1.0)
    if kind != "default" and not identity:
        raise UserError(f"{fields.where}: RoPE scaling {shown(kind)} ({key}) is not supported")
    return None


def _llama3_factor(fields: Fields, name: str, block: dict[str, Any]) -> float:
    for key, wanted in LLAMA3.items():
        value = block.get(key)
        if isinstance(value, bool) or value != wanted:
            raise UserError(
                f"{fields.where}: {name}: RoPE scaling 'llama3' with {key} = {shown(value)} is not supported"
            )
    return fields.check_number(f"{name}.factor", block.get("factor"), *FACTOR_RANGE)


def with_both_rope_keys(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """A copy of a config that transformers 4 and 5 read alike: each knows one spelling and ignores the other."""
    block = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    block["rope_type"] = block.pop("type", None) or block.get("rope_type", "default")
    scaling = {k: v for k, v in block.items() if k != "rope_theta"} if block["rope_type"] != "default" else None
    both = {**config, "rope_theta": theta, "rope_parameters": {**block, "rope_theta": theta}}
    if scaling is None and config.get("rope_scaling") is None:
        return both
    # Without a base inside: transformers 5 would take that one.
    kept = {key: value for key, value in (config.get("rope_scaling") or scaling or {}).items() if key != "rope_theta"}
    return {**both, "rope_scaling": kept}


def length_note(config: dict[str, Any]) -> str | None:
    """What to say of `max_position_embeddings`, which nothing here reads and other programs do."""
    length = config.get("max_position_embeddings")
    if length is None or (type(length) is int and length > 0):
        return None
    return (
        f"max_position_embeddings = {shown(length)}: it is not read here, but lm_eval and vLLM take it for the longest "
        "prompt: write the length that the model was trained with (olmo-core's exports say -1)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is unreadable or no JSON object."""
    return read_object(path)
