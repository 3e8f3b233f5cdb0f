"""Would two Hugging Face folders do as a base and a reference? Their configs and tokenizers tell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.hf import tokenizer
from remit_megatron.hf.config import read_json
from remit_megatron.hf.families import read_shape
from remit_megatron.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Pair:
    """What was found about a base and a reference: one line each."""

    wrong: list[str]
    """Any of these, and the pair does not do."""
    notes: list[str]


def check_pair(base: Path, reference: Path) -> Pair:
    """Compare two Hugging Face folders, reading configs and tokenizers only. Raises UserError for an unreadable one."""
    shapes = {path: read_shape(read_json(path / "config.json"), path / "config.json") for path in (base, reference)}
    wrong, notes = _compare_shapes(shapes[base], shapes[reference])
    parts = {path: tokenizer.content(path) for path in (base, reference)}
    absent = [str(path) for path, content in parts.items() if content is None]
    if absent:
        wrong.append(f"tokenizer: no tokenizer.json in {', '.join(absent)}: that both use the same cannot be shown")
    else:
        not_same, fine = tokenizer.differences(_known(parts[base]), _known(parts[reference]))
        wrong, notes = wrong + not_same, notes + fine
    for path, content in parts.items():
        if content is not None and tokenizer.largest_id(content) >= shapes[path].vocab_size:
            wrong.append(
                f"tokenizer: {path} has ids up to {tokenizer.largest_id(content)}, its model "
                f"{shapes[path].vocab_size} rows"
            )
    return Pair(wrong, notes)


def _compare_shapes(one: ModelShape, other: ModelShape) -> tuple[list[str], list[str]]:
    wrong, notes = [], [f"rope_theta: {one.rope_theta:g} and {other.rope_theta:g}; each model keeps its own"]
    if one.vocab_size != other.vocab_size:
        wrong.append(f"vocabulary: {one.vocab_size} rows and {other.vocab_size}: their losses cannot be compared")
    for key in ModelShape.model_fields:
        a, b = getattr(one, key), getattr(other, key)
        if key not in ("vocab_size", "rope_theta") and a != b:
            notes.append(f"{key}: {a} and {b}; a reference may differ from the student in this")
    return wrong, notes


def _known(content: dict[str, Any] | None) -> dict[str, Any]:
    assert content is not None
    return content
