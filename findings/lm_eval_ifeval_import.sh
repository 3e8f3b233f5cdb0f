#!/bin/bash
# lm-eval 0.4.13: does the import of its checks of IFEval touch the network?
# Guess: no, an import only defines. Seen: it looks for nltk's punkt_tab and downloads it where it is not there, so a
# machine without a network waits and says so at an import, also where no instruction that needs it is checked.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps lm-eval==0.4.13
"$work/venv/bin/pip" install --quiet nltk==3.10.4 immutabledict==4.3.1 packaging
NLTK_DATA="$work/none" HOME="$work" "$work/venv/bin/python" - <<'P'
import importlib.metadata
import runpy

import nltk

asked = []
nltk.download = lambda name, *_, **__: asked.append(name)  # so that the download is seen and nothing is fetched
package = importlib.metadata.distribution("lm-eval")
runpy.run_path(str(package.locate_file("lm_eval/tasks/ifeval/instructions_util.py")))
print(f"lm-eval {package.version}, nltk {nltk.__version__}: the import asked for {asked}")
assert asked == ["punkt_tab"], "this version does otherwise"
P
