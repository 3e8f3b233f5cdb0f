"""The model families, each a file with a reader of its config and a table of its tensor names.

A name table maps a parameter of this package's model (Megatron's local layer) to the Hugging Face tensors that it
holds: three for query, key and value, two for gate and up, else one. See docs/families.md for how to add a family.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.hf.config import REFUSED, Fields, shown
from remit_megatron.hf.mapping import llama, olmo2, qwen2, qwen3, smollm3, youtu
from remit_megatron.hf.mapping.base import Family, layer_shapes
from remit_megatron.shape import ModelShape

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.FAMILY,
        olmo2.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        smollm3.FAMILY,
        youtu.FAMILY,
    )
}


def family_of(shape: ModelShape) -> Family:
    """The family of a shape. The plain GPT of this package is a Llama in all but name."""
    return FAMILIES["llama" if shape.family == "gpt" else shape.family]


def read_shape(config: dict[str, Any], where: str | Path, allowed: Collection[str] = ()) -> ModelShape:
    """The shape that a config.json describes. Raises UserError naming what is missing, unknown or not supported.

    allowed: keys that the user answers for; see `Fields`.
    """
    return read_fields(config, where, allowed)[0]


def read_fields(config: dict[str, Any], where: str | Path, allowed: Collection[str] = ()) -> tuple[ModelShape, Fields]:
    """As `read_shape`, with the fields that it was read from."""
    fields = Fields(config, str(where), allowed)
    for key, what in REFUSED.items():
        if config.get(key):
            raise UserError(f"{where}: {what} ({key}) is not supported")
        fields.take(key, None)
    kind = fields.take("model_type")
    names = {name: family for family in FAMILIES.values() for name in (family.name, family.former_name) if name}
    family = names.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"{where}: model_type {shown(kind)} is not supported; known: {', '.join(FAMILIES)}")
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(f"{where}: architectures = {shown(architectures)}: only {family.architecture} is supported")
    shape = family.read(fields)
    fields.finish()
    return shape, fields


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model and its shape, computed from sizes alone."""
    rows = {
        "model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size),
        "lm_head.weight": (shape.vocab_size, shape.hidden_size),
        "model.norm.weight": (shape.hidden_size,),
    }
    of_layer = layer_shapes(shape)
    names = [name for parts in tensor_names(shape).values() for name in parts]
    return {name: rows[name] if name in rows else of_layer[name.split(".", 3)[3]] for name in names}


def tensor_names(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Every parameter of the model and the Hugging Face tensors it holds, in the order of the model."""
    family = family_of(shape)
    names: dict[str, tuple[str, ...]] = {"embedding.word_embeddings.weight": ("model.embed_tokens.weight",)}
    for layer in range(shape.num_layers):
        for ours, theirs in family.layer.items():
            names[f"decoder.layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{name}" for name in theirs)
    names["decoder.final_layernorm.weight"] = ("model.norm.weight",)
    if not shape.tied_embeddings:
        names["output_layer.weight"] = ("lm_head.weight",)
    return names
