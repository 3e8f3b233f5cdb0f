"""A model that has learned the wording of GSM8K's items, and invented items in the formats of two benchmarks."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.data_prep import tokenizers
from tests.hf import tiny

NAMES = ("Ann", "Bo", "Cy", "Di")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sum_item(name: str, a: int, b: int) -> dict[str, str]:
    """In GSM8K's format."""
    return {"question": f"{name} has {a} and gets {b}.", "answer": f"#### {a + b}"}


def choice_item(name: str, a: int, b: int) -> dict[str, Any]:
    """In ARC's format, with choices of several lengths; which is right follows no rule that could be learned."""
    texts = [f"{a + b}", f"{abs(a - b)} {name}", f"{name} gets {a}", f"{b}{a}{b}"]
    answer = "ABCD"[(a * 5 + b * 3) % 4]
    choices = {"text": texts, "label": list("ABCD")}
    return {"id": f"{name}-{a}-{b}", "question": f"{name} has {a}, gets {b}?", "choices": choices, "answerKey": answer}


def sum_text(item: dict[str, str], answered: bool = True) -> str:
    """As lm_eval's gsm8k words an item."""
    return f"Question: {item['question']}\nAnswer:" + (f" {item['answer']}" if answered else "")


def choice_text(item: dict[str, Any], chosen: int | None) -> str:
    """As lm_eval's arc_challenge words an item."""
    chosen_text = "" if chosen is None else f" {item['choices']['text'][chosen]}"
    return f"Question: {item['question']}\nAnswer:{chosen_text}"


def right(item: dict[str, Any]) -> int:
    return "ABCD".index(item["answerKey"])


# The examples of a prompt are drawn at random: as copies of one, they make a prompt that any draw gives.
SUM_SHOT, CHOICE_SHOT = sum_item("Ann", 1, 2), choice_item("Ann", 1, 2)
SUMS = [sum_item(NAMES[i % 4], i % 5 + 1, i // 3) for i in range(12)]
CHOICES = [choice_item(NAMES[i % 4], i % 7, i // 4 + 1) for i in range(20)]


def write_jsonl(path: Path, items: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_data(folder: Path) -> None:
    """Both benchmarks' files, as GSM8K and ARC name their splits."""
    write_jsonl(folder / "gsm8k/train.jsonl", [SUM_SHOT] * 30)
    write_jsonl(folder / "gsm8k/test.jsonl", SUMS)
    for split in ("train", "validation"):
        write_jsonl(folder / f"arc/{split}.jsonl", [CHOICE_SHOT] * 30)
    write_jsonl(folder / "arc/test.jsonl", CHOICES)


def save_model(folder: Path, *, steps: int, seed: int = 0) -> Path:
    """Train for some steps on other items, and save with tokenizer and chat template."""
    tokenizers.save("olmo2", folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizers.EOD, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.build("olmo2")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    model = tiny.make_model("olmo2", seed, vocab_size=700, eos_token_id=0, bos_token_id=0, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # smaller, so that it learns quickly
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(1)
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(steps):
        batch = torch.tensor([_sample(tokenizer, draw) for _ in range(2)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.save(model, folder)


def _sample(tokenizer: Any, draw: random.Random) -> list[int]:
    """[400] token ids: as long as the prompts of the evaluation."""
    ids: list[int] = []
    while len(ids) < 400:
        ids += tokenizer.encode(sum_text(sum_item(draw.choice(NAMES), draw.randrange(1, 6), draw.randrange(4)))).ids
        ids += tokenizer.encode("\n\n").ids
    return ids[:400]
