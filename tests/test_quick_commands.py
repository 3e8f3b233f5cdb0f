"""Commands that build no model, and mistakes that need none to be seen, import neither torch nor Megatron."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.hf.mapping import read_shape, tensor_shapes
from tests.train.runs import SEQUENCE, VOCAB, make_data, settings

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "launch" / "recipes" / "olmo2_1b_remit.toml"
HEAVY = ("torch", "megatron", "wandb", "transformers", "triton", "lm_eval", "datasets")
PROGRAM = f"""
import contextlib, io, json, sys
from remit_megatron.cli import main

for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps(dict(code=code, out=out.getvalue(), err=err.getvalue(), heavy=heavy)))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one command did."""

    code: int
    out: str
    err: str
    heavy: list[str]


def run_all(commands: list[list[str]], folder: Path) -> list[Done]:
    """All commands in one fresh process, one after the other, so that the first to import something heavy shows."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(folder)},
    )
    return [Done(**json.loads(line)) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, recipes, a run's metrics, and Hugging Face folders."""
    folder = tmp_path_factory.mktemp("quick")
    make_data(folder)
    for name in ("one", "two"):
        write_hf_folder(folder / name)
        (folder / "runs" / name).mkdir(parents=True)
        lines = [{"step": step, "tokens": 100 * step, "step_ms": 5.0, "nll": 3.0 / step, "ranks": 1} for step in (1, 2)]
        (folder / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ntp = settings(folder, "run")
    remit = ntp | {"objective": {"name": "remit"}, "reference": {"path": str(folder / "one")}}
    (folder / "runs" / "one" / "recipe.toml").write_text(dump_toml(parse_recipe(ntp)))
    for name, recipe in (("ntp", ntp), ("remit", remit)):
        (folder / f"{name}.toml").write_text(dump_toml(parse_recipe(recipe)))
    return folder


def write_hf_folder(folder: Path) -> None:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: np.zeros(sizes, dtype=np.float32) for name, sizes in tensor_shapes(read_shape(config, folder)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    tokens = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_commands_that_build_no_model(folder: Path) -> None:
    select = ["--large", "large.npy", "--small", "small.npy", "--output", "selected"]
    documents = json.loads((folder / "train.manifest.json").read_text())["num_documents"]
    for name, seed in (("large", 0), ("small", 1)):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).random(documents))
    (folder / "text.jsonl").write_text('{"text": "t1 t2"}\n')
    commands = {
        "help": ["--help"],
        "version": ["--version"],
        "check": ["check", "ntp.toml"],
        "check with a Hugging Face folder": ["check", "remit.toml"],
        "plan": ["plan", str(SHIPPED), "--gpus", "8"],
        "plan with a Hugging Face folder": ["plan", "remit.toml", "--gpus", "2"],
        "convert check": ["convert", "check", "one", "two"],
        "data tokenize": ["data", "tokenize", "text.jsonl", "--tokenizer", "one", "--output", "text", "--workers", "1"],
        "data verify": ["data", "verify", "train", "--full"],
        "data stats": ["data", "stats", "train"],
        "data peek": ["data", "peek", "train", "--doc", "0"],
        "data merge": ["data", "merge", "train", "held", "--output", "merged"],
        "data mix": ["data", "mix", "ntp.toml"],
        "data select": ["data", "select", "train", *select],
        "analyze runs": ["analyze", "runs", "runs/one", "runs/two", "--metric", "nll", "--output", "compared"],
        "status": ["status", "runs/one"],
    }
    for name, done in zip(commands, run_all(list(commands.values()), folder), strict=True):
        assert done.code == 0, f"{name}: {done.err}"
        assert done.out, name
        assert not done.heavy, f"{name} imports {done.heavy}"


def test_mistakes_are_seen_before_torch_is_imported(folder: Path) -> None:
    """Each with exit code 2 and a line that says what is wrong."""
    taken = folder / "taken"
    taken.mkdir()
    (taken / "letters.txt").write_text("no run")
    batch = f"batch.global_batch_tokens={SEQUENCE * 7}"
    commands = {
        "cannot be read": ["train", "absent.toml"],
        "did you mean peak_lr?": ["train", "ntp.toml", "--set", "optimizer.peak_rl=1"],
        "needs a [reference] section": ["eval", "ntp.toml", "--checkpoint", "x", "--set", "objective.name=remit"],
        "unknown key objective.epsilon": ["score", "ntp.toml", "--set", "objective.epsilon=0.1"],
        "3 ranks do not divide": ["train", "ntp.toml", "--nproc", "3", "--set", "parallel.tensor=2"],
        "7 samples, which do not divide": ["train", "ntp.toml", "--set", batch],
        "holds no run": ["train", "ntp.toml", "--set", f"run={taken}"],
        "--output, --shard, --check": ["score", "ntp.toml", "--follow", "--check"],
        "does not exist: name a checkpoint": ["check", "ntp.toml", "--set", "model.init=nowhere"],
        "nowhere.idx: no such file": ["check", "ntp.toml", "--set", 'data.train=[{path="nowhere"}]'],
        "sees no CUDA device": ["check", "ntp.toml", "--set", "compute.device=cuda"],
        "--gpu TPU is unknown": ["plan", "ntp.toml", "--gpus", "1", "--gpu", "TPU"],
        "and is no hub id": ["convert", "import", "nowhere", "new"],
        "a number above 0": ["convert", "export", "x", "new", "--like", "one", "--max-shard-gb", "0"],
        "write it as NAME=CHECKPOINT": ["analyze", "tokens", "ntp.toml", "--models", "x", "--output", "new"],
        "no run here": ["status", "runs"],
        "no run with metrics here": ["sync-wandb", "runs"],
        "remit benchmark needs MODEL": ["benchmark"],
    }
    for words, done in zip(commands, run_all(list(commands.values()), folder), strict=True):
        assert done.code == 2, f"{words}: {done}"
        assert done.err.startswith("remit: "), done.err
        assert done.err.count("\n") == 1, done.err
        assert words in done.err
        assert not done.heavy, f"'{words}' imports {done.heavy}"
