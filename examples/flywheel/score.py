"""How many held-out problems a model solves by its most probable answer, asked in plain text and as a conversation.

python examples/flywheel/score.py --problems held_out.jsonl --model FOLDER --output figures.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remit_megatron.posttrain.verifiers import VERIFIERS

NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=Path, required=True, help="rows with prompt, messages and ground_truth")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.problems.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    plain = [row["prompt"] for row in rows]
    chat: list[Any] = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    figures = {name: accuracy(model, tokenizer, texts, rows) for name, texts in (("plain", plain), ("chat", chat))}
    arguments.output.write_text(json.dumps(figures))


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, texts: list[str], rows: list[dict[str, Any]]) -> float:
    """The share of right final numbers."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    made = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(made[:, batch["input_ids"].size(1) :], skip_special_tokens=True)
    verifier = VERIFIERS["gsm8k"]
    right = [verifier.score(text, row["ground_truth"]) for text, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
