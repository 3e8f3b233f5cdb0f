"""Does a checkpoint compute what its Hugging Face folder computes?"""

from dataclasses import dataclass
from pathlib import Path

import torch

from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.hf.tokenizer import has_tokenizer
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.whole import whole_model
from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint

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
    if not has_tokenizer(folder):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (64,), generator=generator).tolist()
    ids = load_tokenizer(folder, "HF_FOLDER").encode(text, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"{folder}: its tokenizer gives no id for the text: name another with --text")
    if max(ids) >= vocab_size:
        raise UserError(f"{folder}: its tokenizer gives id {max(ids)}, the model has {vocab_size} rows")
    return ids
