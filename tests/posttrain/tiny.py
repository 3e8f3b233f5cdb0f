"""A small model that learns sums of two digits, and its three kinds of data."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from remit_megatron.posttrain.contract import DPO, RL, SFT, Chat, StageSpec, data_files
from tests.hf import tiny

EOD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 300


CHAT = Chat(end_of_turn=END)


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE, eos: str = EOD) -> None:
    """Bytes and three special tokens, and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[EOD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\nassistant\nanswer is"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": EOD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def save_base(folder: Path, case: str = "olmo2", dtype: torch.dtype = torch.float32, **tokenizer: Any) -> Path:
    """An untrained model that small steps can teach."""
    sizes = {"vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    model = tiny.make_model(case, eos_token_id=0, bos_token_id=0, max_position_embeddings=256, **sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(1)
    tiny.save(model.to(dtype), folder)
    save_tokenizer(folder, **tokenizer)
    return folder


def sums(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(question, answer): one digit each, modulo 10."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return [(f"{a}+{b}", str((a + b) % 10)) for a, b in pairs]


def sft_rows(count: int) -> list[Any]:
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in sums(count)]


def dpo_rows(count: int) -> list[Any]:
    return [
        {
            "prompt": [{"role": "user", "content": q}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": str((int(a) + 1) % 10)}],
        }
        for q, a in sums(count, 1)
    ]


def rl_rows(count: int) -> list[Any]:
    return [
        {"prompt": [{"role": "user", "content": q}], "ground_truth": a, "verifier": "gsm8k"} for q, a in sums(count, 2)
    ]


SFT_SETTINGS = SFT(peak_lr=3e-3, batch_samples=8, microbatch_samples=4, max_tokens=64, epochs=2, save_every_steps=4)
DPO_SETTINGS = DPO(peak_lr=3e-4, batch_samples=8, microbatch_samples=4, max_tokens=64, save_every_steps=2)
RL_SETTINGS = RL(
    peak_lr=1e-3,
    schedule="constant",
    batch_samples=32,
    microbatch_samples=16,
    steps=8,
    completions=8,
    max_prompt_tokens=32,
    max_completion_tokens=6,
    kl=0.01,
    save_every_steps=2,
)


def spec(kind: str, model: Path, rows: Path, **changes: Any) -> StageSpec:
    """A request with the settings above."""
    settings = {"sft": SFT_SETTINGS, "dpo": DPO_SETTINGS, "rl": RL_SETTINGS}[kind]
    chat = CHAT if kind == "sft" else Chat()
    asked = {"name": kind, "kind": kind, "model": str(model), "data": data_files([rows]), "chat": chat, kind: settings}
    return StageSpec(**{**asked, **changes})
