#!/bin/bash
# gigatoken 0.10.0: how much memory does a tokenizer take that encodes text in small calls?
# Guess: about as much at the end as after the first megabytes. Seen: it keeps every word that it has seen, and grows
# with the number of different ones, for as long as it lives.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet gigatoken==0.10.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'P'
import importlib.metadata
import random

import gigatoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
tokenizer = gigatoken.Tokenizer.from_json(made.to_str())
draw = random.Random(0)


def resident_mb() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1000 for line in status if line.startswith("VmRSS"))


sizes = []
for _ in range(4):
    for _ in range(200):
        words = (f"{draw.getrandbits(40):x}" for _ in range(10_000))
        tokenizer.encode(" ".join(words))
    sizes.append(resident_mb())
version = importlib.metadata.version("gigatoken")
print(f"gigatoken {version}: MB resident after 22, 44, 66 and 88 MB of random words: {sizes}")
assert sizes[3] > sizes[0] + 30, "this version does otherwise"
P
