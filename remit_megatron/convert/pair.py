"""Would a base and a reference do as a pair? From their configs and tokenizers, without their weights."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from remit_megatron.data.tokenizer import largest_id, load_tokenizer
from remit_megatron.hf.config import length_note, read_json
from remit_megatron.hf.mapping import read_fields
from remit_megatron.hf.tokenizer import Difference, compare, has_tokenizer, read_canonical
from remit_megatron.shape import ModelShape


@dataclass(slots=True)
class Pair:
    """What was found about a base and a reference: one line each."""

    wrong: list[str] = field(default_factory=list)
    """Any of these, and the pair does not do."""
    notes: list[str] = field(default_factory=list)


def check_pair(
    base: Path, reference: Path, allow_added_tokens: bool = False, allowed_keys: Collection[str] = ()
) -> Pair:
    """Compare two Hugging Face folders, reading configs and tokenizers only. Raises UserError for an unreadable one.

    allow_added_tokens: whether added tokens may differ. allowed_keys: of either config.json; see `hf.config.Fields`.
    """
    found = Pair()
    shapes = {}
    for path in dict.fromkeys((base, reference)):
        config = read_json(path / "config.json")
        shapes[path], fields = read_fields(config, path / "config.json", allowed_keys)
        found.notes += [f"{path}: {key} is allowed by --allow-key" for key in fields.allowed_keys()]
        length = length_note(config)
        found.notes += [f"{path}: {length}"] if length else []
    absent = [str(path) for path in shapes if not has_tokenizer(path)]
    for path in shapes:
        if has_tokenizer(path):
            load_tokenizer(path)  # a file may say the same of ids, and be none that the library loads
    same = False
    if absent:
        where = ", ".join(absent)
        found.wrong.append(f"tokenizer: no tokenizer.json in {where}: that both use the same cannot be shown")
    else:
        same = _compare_tokenizers(compare(base, reference), allow_added_tokens, found)
    _compare_shapes(shapes[base], shapes[reference], same, found)
    for path in shapes:
        largest = largest_id(read_canonical(path)) if has_tokenizer(path) else -1
        if largest >= shapes[path].vocab_size:
            found.wrong.append(f"tokenizer: {path} has ids up to {largest}, its model {shapes[path].vocab_size} rows")
    return found


def _compare_tokenizers(difference: Difference | None, allow_added_tokens: bool, found: Pair) -> bool:
    """Whether the two may count as one tokenizer."""
    if difference is None:
        return True
    allowed = allow_added_tokens and difference.only_added_tokens
    lines = [f"tokenizer: {reason}" for reason in difference.reasons]
    if difference.example:
        lines.append(f"tokenizer: {difference.example}")
    if difference.only_added_tokens and not allowed:
        lines.append("tokenizer: ids differ only in texts that spell such a token: --allow-added-tokens accepts that")
    (found.notes if allowed else found.wrong).extend(lines)
    return allowed


def _compare_shapes(one: ModelShape, other: ModelShape, same_tokenizer: bool, found: Pair) -> None:
    if one.rope_theta != other.rope_theta:
        found.notes.append(f"rope_theta: {one.rope_theta:g} and {other.rope_theta:g}; each model keeps its own")
    if one.vocab_size != other.vocab_size:
        rows = f"vocabulary: {one.vocab_size} rows and {other.vocab_size}"
        if same_tokenizer:
            found.notes.append(
                f"{rows}, of one tokenizer: the rows past its ids are padding; remit and rho1 read the label's loss "
                "alone, and objectives that compare distributions have the common rows"
            )
        else:
            found.wrong.append(f"{rows}: their losses cannot be compared")
    for key in ModelShape.model_fields:
        a, b = getattr(one, key), getattr(other, key)
        if key not in ("vocab_size", "rope_theta") and a != b:
            found.notes.append(f"{key}: {a} and {b}; a reference may differ from the student in this")
