"""Does a checkpoint compute what its Hugging Face folder computes? And would a base and a reference do as a pair?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remit_megatron.errors import UserError
from remit_megatron.hf import tokenizer
from remit_megatron.hf.config import read_json
from remit_megatron.hf.mapping import read_shape
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import whole_model
from remit_megatron.shape import ModelShape
from remit_megatron.train.checkpoint import read_meta, resolve_checkpoint

TEXT = (
    "In 2023 the committee asked 17 students to prove that the sum of two odd numbers is even. "
    "def add(a, b):\n    return a + b\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Float32 logits of two implementations over one text."""

    num_tokens: int
    largest: float
    """Largest absolute difference of a logit."""
    mean: float
    spread: float
    """Standard deviation of the logits, to judge the differences by."""
    argmax_equal: float
    """Share of positions with the same most likely token."""

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens: logits differ by at most {self.largest:.2e}, {self.mean:.2e} on average "
            f"(their standard deviation is {self.spread:.2f}); the most likely token agrees on {self.argmax_equal:.1%}"
        )


@torch.no_grad()
def compare_logits(folder: Path, checkpoint: str, text: str = TEXT) -> Agreement:
    """Run both models in float32 on the CPU. Raises UserError without transformers, or for an unreadable side."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("convert verify compares with transformers, which is not installed: pip install transformers") \
            from None  # fmt: skip
    path = resolve_checkpoint(checkpoint, "CHECKPOINT")
    shape = read_meta(path).model_shape()
    tokens = torch.tensor([token_ids(folder, text, shape.vocab_size)])
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    want = theirs(tokens).logits[0]
    del theirs
    with whole_model(shape, torch.float32, max_sequence_length=tokens.size(1)) as model:
        dist_checkpoint.load_model(path, [model])
        got = model(tokens, torch.arange(tokens.size(1))[None], None)[0]
    if got.shape != want.shape:
        raise UserError(f"{folder}: has {want.size(-1)} vocabulary rows, the checkpoint {got.size(-1)}")
    difference = (got - want).abs()
    return Agreement(
        num_tokens=tokens.size(1),
        largest=float(difference.max()),
        mean=float(difference.mean()),
        spread=float(want.std()),
        argmax_equal=float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    )


def token_ids(folder: Path, text: str, vocab_size: int) -> list[int]:
    """Ids of the text by the folder's tokenizer.json, or where it has none, ids spread over the vocabulary."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (64,), generator=generator).tolist()
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(file)).encode(text).ids
    if max(ids) >= vocab_size:
        raise UserError(f"{file}: gives id {max(ids)}, the model has {vocab_size} rows")
    return ids


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
