#!/bin/bash
# lm-eval 0.4.13, task gsm8k_cot_zeroshot: what does its strict pattern read from an answer that ends with the number?
# Guess: the number. Seen: the pattern wants one more character after it, so "The answer is 18" is read as 1, and
# counted as wrong; with a full stop it is read as 18.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps lm-eval==0.4.13
"$work/venv/bin/python" - <<'P'
import importlib.metadata
import json
import re

package = importlib.metadata.distribution("lm-eval")
task = package.locate_file("lm_eval/tasks/gsm8k/gsm8k-cot-zeroshot.yaml").read_text()
pattern = json.loads(re.findall(r'regex_pattern: (".*")', task)[0])
found = {text: re.findall(pattern, text) for text in ("The answer is 18", "The answer is 18.")}
print(f"lm-eval {package.version}, {pattern}: {found}")
assert found == {"The answer is 18": ["1"], "The answer is 18.": ["18"]}, "this version does otherwise"
P
