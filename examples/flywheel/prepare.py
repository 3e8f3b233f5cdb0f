"""Make what the small wheel starts from: a tokenizer with a chat template, data of every kind, and a base model.

    python examples/flywheel/prepare.py [--out runs/flywheel] [--quick]

Arithmetic word problems: statements for the base, worked solutions for mid-training, conversations, preferences and
problems with a ground truth for post-training, and held-out ones, whose numbers no other of their kind has.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.writer import write_dataset
from examples.smoke.arithmetic import Problem, problems
from examples.smoke.build import encode
from examples.smoke.tokenizer import EOD_TOKEN, train_tokenizer
from remit_megatron.data.files import write_atomically
from remit_megatron.data.tokenizer import tokenizer_hash

HERE = Path(__file__).parent
VOCAB_SIZE = 512
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("groups", "rate", "share")
"""Times tables in words: a product that is held out in one wording is trained in others."""
SEEDS = {"statements": 1, "worked": 2, "sft": 3, "dpo": 4, "rl": 5, "held_out": 6}
DOCUMENTS = {"statements": 6_000, "worked": 12_000, "sft": 800, "dpo": 300, "rl": 600, "held_out": 160}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "dtype": "float32",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/flywheel"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: tests the way, learns nothing")
    arguments = parser.parse_args()
    out, share = arguments.out, 0.05 if arguments.quick else 1.0
    if (out / "base" / "config.json").exists():
        print(f"{out / 'base'}: is there already")
        return 0
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(data, {name: max(40, int(count * share)) for name, count in DOCUMENTS.items()})
    like = out / "like"
    write_model_files(like, tokenizer)
    return make_base(out, like, arguments.quick)


def stream(name: str, count: int) -> list[Problem]:
    """The first problems of these kinds of a seed."""
    found = problems(SEEDS[name], held_out=name == "held_out")
    return list(islice((problem for problem in found if problem.kind in KINDS), count))


def make_tokenizer(data: Path, counts: dict[str, int]) -> Tokenizer:
    """Write every file of data; the tokenizer that the datasets were made with, as data/tokenizer.json."""
    drawn = {name: stream(name, count) for name, count in counts.items()}
    texts = {"statements": [p.statement for p in drawn["statements"]], "worked": [p.document for p in drawn["worked"]]}
    tokenizer = train_tokenizer(texts["worked"][:3000] + texts["statements"][:1000], VOCAB_SIZE - 3)
    tokenizer.add_special_tokens([USER, ASSISTANT, END])
    write_atomically(data / "tokenizer.json", tokenizer.to_str().encode())
    for name, documents in texts.items():
        write_dataset(
            data / name,
            encode(tokenizer, documents),
            vocab_size=VOCAB_SIZE,
            eod_id=tokenizer.token_to_id(EOD_TOKEN),
            tokenizer_hash=tokenizer_hash(data / "tokenizer.json"),
        )
    draw = random.Random(0)
    write_jsonl(data / "sft.jsonl", ({"messages": [*ask(p), answer(p.solution)]} for p in drawn["sft"]))
    write_jsonl(data / "dpo.jsonl", (preference(p, draw) for p in drawn["dpo"]))
    write_jsonl(data / "rl.jsonl", ({"messages": ask(p), "ground_truth": p.answer} for p in drawn["rl"]))
    write_jsonl(data / "held_out.jsonl", ({"prompt": p.prompt, **row(p)} for p in drawn["held_out"]))
    return tokenizer


def ask(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(problem: Problem) -> dict[str, Any]:
    return {"messages": ask(problem), "ground_truth": problem.answer}


def preference(problem: Problem, draw: random.Random) -> dict[str, Any]:
    """The solution above one whose result is another number."""
    wrong = str(int(problem.answer) + draw.choice((-2, -1, 1, 2)))
    rejected = problem.solution.replace(f"={problem.answer} ", f"={wrong} ").replace(
        f"{{{problem.answer}}}", f"{{{wrong}}}"
    )
    return {"prompt": ask(problem), "chosen": [answer(problem.solution)], "rejected": [answer(rejected)]}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]] | Iterator[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_model_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Config, tokenizer and chat template, of which an export takes its own."""
    folder.mkdir(exist_ok=True)
    end = tokenizer.token_to_id(END)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_atomically(folder / "chat_template.jinja", TEMPLATE.encode())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": EOD_TOKEN}
    write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=1).encode())
    write_atomically(
        folder / "config.json",
        json.dumps({**CONFIG, "eos_token_id": end, "pad_token_id": tokenizer.token_to_id(EOD_TOKEN)}).encode(),
    )


def make_base(out: Path, like: Path, quick: bool) -> int:
    """Pre-train on statements, and export."""
    remit = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]
    sets: dict[str, Any] = {"run": out / "base-run", "data.tokenizer": out / "data/tokenizer.json"}
    sets |= {"data.train": f'[{{path = "{out / "data/statements"}"}}]'}
    sets |= {"schedule.train_tokens": 4096, "schedule.warmup_tokens": 1024} if quick else {}
    line = [*remit, "train", str(HERE / "base.toml")]
    code = subprocess.run([*line, *(part for k, v in sets.items() for part in ("--set", f"{k}={v}"))]).returncode
    if code == 0:
        line = ["convert", "export", str(out / "base-run"), str(out / "base"), "--like", str(like)]
        code = subprocess.run([*remit, *line]).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
