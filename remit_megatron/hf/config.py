"""config.json: read key by key, so that nothing that could change the model goes unnoticed."""

import json
from pathlib import Path
from typing import Any

from remit_megatron.errors import UserError

# Keys that say nothing of the function from tokens to logits.
IGNORED = frozenset(
    (
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "embedding_initializer_range",
        "max_position_embeddings",
        "attention_dropout",
        "hidden_dropout",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "tokenizer_class",
        "task_specific_params",
        "torchscript",
        "use_bfloat16",
        "is_decoder",
        "pruned_heads",
        "tie_encoder_decoder",
        "unsloth_version",
        "unsloth_fixed",
    )
)
GENERATION = frozenset(
    (
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
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


class Fields:
    """The keys of a config.json, each read once. `where` names the file in messages."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where
        self.read: set[str] = set(IGNORED | GENERATION)

    def take(self, key: str, default: Any = MISSING) -> Any:
        """A value, or the default of the model's class in transformers. Raises UserError where a key is missing."""
        self.read.add(key)
        if key in self.values:
            return self.values[key]
        if default is MISSING:
            raise UserError(f"{self.where}: missing key {key}")
        return default

    def size(self, key: str, default: Any = MISSING) -> int:
        """A positive integer; null means the default."""
        value = self.take(key, default)
        if value is None and default is not MISSING:
            value = default
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {key} = {json.dumps(value)} is no positive integer")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise UserError(f"{self.where}: {key} = {json.dumps(value)} is neither true nor false")
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if type(value) not in (int, float) or not value > 0:
            raise UserError(f"{self.where}: {key} = {json.dumps(value)} is no positive number")
        return float(value)

    def expect(self, key: str, wanted: Any, what: str) -> None:
        """Raise UserError naming `what` is not supported, unless the key is absent or has the wanted value."""
        value = self.take(key, wanted)
        if value != wanted:
            raise UserError(f"{self.where}: {key} = {json.dumps(value)}: {what} is not supported")

    def finish(self) -> None:
        """Raise UserError naming the first key that nobody has read."""
        unknown = sorted(self.values.keys() - self.read)
        if unknown:
            raise UserError(
                f"{self.where}: unknown key {unknown[0]}: it may change what the model computes, so it is refused"
            )


LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Of every published Llama 3; Megatron-Core has them as constants."""


def rope(fields: Fields) -> tuple[float, float | None]:
    """The base of the rotary embedding, and the factor of Llama 3's scaling where it has that.

    From `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4), or both. Raises UserError when they
    disagree, or when positions are scaled in another way.
    """
    parameters = fields.take("rope_parameters", None) or {}
    scaling = fields.take("rope_scaling", None) or {}
    old = fields.take("rope_theta", None)
    factors = []
    for block in filter(None, (parameters, scaling)):
        kind = block.get("rope_type", block.get("type", "default"))
        # At a factor of 1 YaRN's frequencies and scale are those of the plain embedding.
        identity = kind == "yarn" and block.get("factor") == 1.0 and block.get("attention_factor") in (None, 1.0)
        factors.append(_llama3_factor(block, fields.where) if kind == "llama3" else None)
        if kind not in ("default", "llama3") and not identity:
            raise UserError(f"{fields.where}: RoPE scaling '{kind}' is not supported")
        if block.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{fields.where}: partial rotary embeddings are not supported")
    if len(set(factors)) > 1:
        raise UserError(f"{fields.where}: rope_parameters and rope_scaling disagree: correct one of them")
    new = parameters.get("rope_theta")
    if new is not None and old is not None and float(new) != float(old):
        raise UserError(
            f"{fields.where}: rope_theta = {old} and rope_parameters.rope_theta = {new} disagree: correct one of them"
        )
    theta = new if new is not None else old
    if theta is None:
        raise UserError(f"{fields.where}: missing key rope_theta (or rope_parameters.rope_theta)")
    if type(theta) not in (int, float) or not theta > 0:
        raise UserError(f"{fields.where}: rope_theta = {json.dumps(theta)} is no positive number")
    return float(theta), factors[0] if factors else None


def _llama3_factor(block: dict[str, Any], where: str) -> float:
    for key, wanted in LLAMA3.items():
        if block.get(key) != wanted:
            raise UserError(
                f"{where}: RoPE scaling 'llama3' with {key} = {json.dumps(block.get(key))} is not supported"
            )
    factor = block.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise UserError(f"{where}: RoPE scaling 'llama3' with factor = {json.dumps(factor)} is not supported")
    return float(factor)


def with_both_rope_keys(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """A copy of a config that transformers 4 and 5 read alike: each knows one spelling and ignores the other."""
    block = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    block["rope_type"] = block.pop("type", None) or block.get("rope_type", "default")
    scaling = {k: v for k, v in block.items() if k != "rope_theta"} if block["rope_type"] != "default" else None
    both = {**config, "rope_theta": theta, "rope_parameters": {**block, "rope_theta": theta}}
    return {"rope_scaling": scaling, **both} if scaling else both


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is unreadable or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object")
    return content
