#!/bin/bash
# tokenizers 0.23.3: what id does an added token get whose tokenizer.json says one?
# Guess: the one that the file says. Seen: the next free one after the vocabulary, without a word, so a file that leaves
# a gap on purpose (reserved rows of the embedding) gives other ids than it says.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'P'
import json

import tokenizers

content = {
    "version": "1.0",
    "added_tokens": [
        {"id": 100, "content": "<end>", "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
    ],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}
found = tokenizers.Tokenizer.from_str(json.dumps(content)).encode("<end>").ids
print(f"tokenizers {tokenizers.__version__}: the file says that <end> is 100, the text '<end>' becomes {found}")
assert found == [2], "this version does otherwise"
P
