"""Models to convert, and the convert commands as a user types them."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.hf import tiny

Outcome = tuple[int, str, str]


def commands(rank: int, lines: list[list[str]]) -> list[Outcome]:
    """Exit code, stdout and stderr of each `remit` command, in one process."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from remit_megatron.cli import main
    from remit_megatron.mcore.platform import activate

    activate("cpu")
    outcomes = []
    for line in lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
        outcomes.append((code, out.getvalue(), err.getvalue()))
    return outcomes


def write_tokenizer(folder: Path, **changes: Any) -> None:
    """A tokenizer of 60 ids; `changes` are keys of tokenizer.json."""
    vocabulary = {chr(33 + i): i for i in range(60)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = {**json.loads(tokenizer.to_str()), **changes}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def make_models(root: Path) -> Path:
    """A tiny model of four families with tokenizers, by the family's name, and an empty folder `out`."""
    (root / "out").mkdir()
    for seed, name in enumerate(("llama", "smollm3", "qwen2", "youtu")):
        tiny.save(tiny.make_model(name, seed), root / name)
        write_tokenizer(root / name)
        (root / name / "generation_config.json").write_text('{"_from_model_config": true}')
    return root
