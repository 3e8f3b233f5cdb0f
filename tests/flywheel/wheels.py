"""Small wheels: a tiny Llama, arithmetic progressions to train on, and an engine of 60 lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from remit_megatron import toml
from remit_megatron.flywheel import report
from remit_megatron.flywheel.config import Wheel, load_wheel
from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.graph import Node, Plan, make_plan
from remit_megatron.flywheel.state import State, assess
from tests.hf import tiny
from tests.train import runs

ENGINE = Path(__file__).parent / "engine.py"
ROOT = Path(__file__).parents[2]
STEPS = 4


def make_base(folder: Path, seed: int = 0, case: str = "llama", **changes: Any) -> Path:
    """A model with a tokenizer of its rows, a chat template and an end of turn. case: of tests.hf.tiny."""
    sizes = {"num_hidden_layers": 2, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None}
    tiny.save(tiny.make_model(case, seed, **{**sizes, **changes}), folder)
    words = {"<eod>": 0, **{f"w{i}": i for i in range(1, runs.VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eod>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eod>"}
    template = "{% for m in messages %}{{ m['content'] }}<eod>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def make_files(root: Path) -> Path:
    """Base, datasets, recipe and wheel.toml in a folder."""
    root.mkdir(parents=True, exist_ok=True)
    runs.make_data(root)
    make_base(root / "base")
    recipe = runs.settings(root, "none", evaluation={"every_steps": 0, "samples": 2}, checkpoint={"every_steps": 2})
    tokens = runs.SEQUENCE * runs.SAMPLES
    recipe["schedule"] = {"train_tokens": STEPS * tokens, "warmup_tokens": 0}
    recipe |= {"model": {}, "reference": {"merge_microbatches": 2}, "objective": {"name": "remit"}}
    (root / "mid.toml").write_text(toml.dumps({k: v for k, v in recipe.items() if k != "run"} | {"run": "unused"}))
    for kind in ("sft", "rl"):
        (root / f"{kind}.jsonl").write_text(json.dumps({"kind": kind, "prompt": "w1", "ground_truth": "w2"}) + "\n")
    write_wheel(root, settings(root))
    return root / "wheel.toml"


def settings(root: Path, *mistake: str) -> dict[str, Any]:
    """A wheel of two stages of post-training."""
    common = {"peak_lr": 1e-3, "batch_samples": 4, "save_every_steps": 2}
    return {
        "wheel": str(root / "wheel"),
        "base": str(root / "base"),
        "mid": {"recipe": str(root / "mid.toml"), "set": {"optimizer.peak_lr": 1e-3}},
        "engine": {"name": "command", "command": [sys.executable, str(ENGINE), "{stage}", *mistake]},
        "sft": {"data": [str(root / "sft.jsonl")], "max_tokens": 16, **common},
        "rl": {"data": [str(root / "rl.jsonl")], "keep": [0.5], "steps": 10, "completions": 2, **common}
        | {"max_prompt_tokens": 8, "max_completion_tokens": 8},
        "arms": {"remit": {}},
    }


def write_wheel(root: Path, content: dict[str, Any]) -> Path:
    path = root / "wheel.toml"
    path.write_text(toml.dumps(content))
    return path


def command(file: Path, action: str, *more: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "flywheel", action, str(file), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def remit(file: Path, action: str, *more: str, expect: int = 0) -> str:
    """Standard output and error of a command of the wheel's."""
    done = subprocess.run(command(file, action, *more), env=environment(), capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(file: Path) -> tuple[Wheel, Contents, Plan]:
    wheel = load_wheel(file)
    contents = Contents(wheel.folder / ".contents.json")
    return wheel, contents, make_plan(wheel, contents)


def states(file: Path) -> dict[str, State]:
    """By the stage's first name."""
    _, contents, plan = planned(file)
    found = assess(plan, contents)
    return {node.name: found[node.folder] for node in plan.nodes}


def nodes(file: Path) -> dict[str, Node]:
    return planned(file)[2].by_name()


def page(file: Path) -> str:
    """The report."""
    _, contents, plan = planned(file)
    return report.page(plan, contents)


def identities(file: Path) -> dict[str, str]:
    """Of every finished stage."""
    found = {}
    for name, node in nodes(file).items():
        path = node.folder / "manifest.json"
        if path.exists():
            found[name] = json.loads(path.read_text())["identity"]
    return found
