"""The stages by TRL, for real, on a tiny model: one after the other, killed, stopped and gone on with.

One worker process serves them all: TRL's import takes longer than a stage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remit_megatron.errors import UserError
from remit_megatron.hf import tokenizer
from remit_megatron.posttrain.contract import KEEP, read_manifest, read_metrics, verify, write_spec
from remit_megatron.posttrain.engines import Workers
from remit_megatron.posttrain.stage import run_stage
from remit_megatron.posttrain.trl_engine import prompt_order
from tests.posttrain import tiny

ROOT = Path(__file__).parents[2]
RUN = "import sys; from pathlib import Path; from remit_megatron.posttrain.stage import run_stage\n"
RUN += "from remit_megatron.errors import RemitError\n"
RUN += "try: run_stage(Path(sys.argv[1]))\nexcept RemitError as error: print(error); sys.exit(error.exit_code)"
ROWS = {"sft": tiny.sft_rows(160), "dpo": tiny.dpo_rows(32), "rl": tiny.rl_rows(24)}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as pool:
        yield pool


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Path:
    """A base in bfloat16, and its three stages, undisturbed."""
    root = tmp_path_factory.mktemp("chain")
    model = tiny.save_base(root / "base", dtype=torch.bfloat16)
    for kind, rows in ROWS.items():
        data = tiny.write_jsonl(root / f"{kind}.jsonl", rows)
        write_spec(root / kind, tiny.spec(kind, model, data, keep=(0.1, 0.5) if kind == "rl" else ()))
        run_stage(root / kind, workers)
        model = root / kind / "model"
    return root


def test_stages(chain: Path) -> None:
    """Each stage learns, and its model has the base's shape, types and token ids."""
    sft, dpo, rl = (read_metrics(chain / kind) for kind in ROWS)
    assert [line["step"] for line in sft] == list(range(1, 41))
    assert sft[-1]["loss"] < 0.5 * sft[0]["loss"]
    assert sft[0]["lr"] == pytest.approx(3e-3)
    assert dpo[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "chosen and rejected begin alike: ln 2"
    assert dpo[-1]["loss"] < dpo[0]["loss"]
    assert len(rl) == 8
    assert all(0 <= line["correct"] <= 1 and line["response_tokens_per_s"] > 0 for line in rl)
    assert len({line["reward"] for line in rl}) > 1
    wanted = tokenizer.read_canonical(chain / "base")
    for kind in ROWS:
        manifest = verify(chain / kind)
        assert manifest.versions["trl"] == "1.16.0"
        model = chain / kind / "model"
        assert tokenizer.read_canonical(model) == wanted
        assert json.loads((model / "tokenizer_config.json").read_text())["eos_token"] == tiny.END
        config = json.loads((model / "config.json").read_text())
        assert (config["vocab_size"], config["eos_token_id"]) == (tiny.ROWS, 2)
        assert {tensor.dtype for tensor in load_file(next(model.glob("*.safetensors"))).values()} == {torch.bfloat16}
        assert not list((chain / kind / "work").glob("checkpoint-*"))
    manifest = verify(chain / "rl")
    assert sorted(manifest.kept) == ["010", "050"]
    assert len({manifest.identity, *manifest.kept.values()}) == 3
    assert (chain / "rl" / KEEP / "010/tokenizer.json").exists()


def test_result_loads_in_transformers(chain: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chain / "rl/model", dtype=torch.float32)
    chat = AutoTokenizer.from_pretrained(chain / "rl/model")
    text = chat.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True)
    ids = chat(text, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.size(1) :]
    assert chat.decode(answer).endswith(tiny.END), "it has learned to end its turn"


def run_and_interrupt(folder: Path, number: int, after_step: int) -> int:
    """Start a stage in a process of its own and send it a signal when a step is logged; its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", RUN, str(folder)], env=environment)
    while child.poll() is None and len(read_metrics(folder)) < after_step:
        time.sleep(0.002)
    child.send_signal(number)
    return child.wait()


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in (folder / "work").glob("checkpoint-*"))


def again(chain: Path, tmp_path: Path, kind: str) -> Path:
    """A folder with the request of a stage of the chain."""
    write_spec(tmp_path / kind, tiny.spec(kind, *_made_from(chain, kind), keep=(0.1, 0.5) if kind == "rl" else ()))
    return tmp_path / kind


def _made_from(chain: Path, kind: str) -> tuple[Path, Path]:
    model = {"sft": chain / "base", "dpo": chain / "sft/model", "rl": chain / "dpo/model"}[kind]
    return model, chain / f"{kind}.jsonl"


def same(chain: Path, folder: Path) -> None:
    """The models, and the figures but for times, of a stage of the chain."""
    one, other = read_manifest(chain / folder.name), read_manifest(folder)
    assert one is not None
    assert other is not None
    assert (other.identity, other.kept) == (one.identity, one.kept)
    timed = ("step_time", "generate_s", "response_tokens_per_s")
    lines = [
        [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(path)]
        for path in (chain / folder.name, folder)
    ]
    assert lines[0] == lines[1]


def test_killed(chain: Path, tmp_path: Path, workers: Workers) -> None:
    """SIGKILL in the middle of reinforcement learning, with a torn checkpoint left: the same model, bit for bit."""
    folder = again(chain, tmp_path, "rl")
    assert run_and_interrupt(folder, signal.SIGKILL, 5) == -signal.SIGKILL
    steps = checkpoint_steps(folder)
    assert steps, "it had saved"
    torn = folder / "work/checkpoint-7"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 7}')
    run_stage(folder, workers)
    same(chain, folder)


def test_stopped(chain: Path, tmp_path: Path, workers: Workers) -> None:
    """SIGTERM in the second epoch: exit code 75 with a checkpoint of the step; then the same model."""
    folder = again(chain, tmp_path, "sft")
    assert run_and_interrupt(folder, signal.SIGTERM, 22) == 75
    done = len(read_metrics(folder))
    assert max(checkpoint_steps(folder)) == done >= 22
    run_stage(folder, workers)
    same(chain, folder)


def test_never_ends(chain: Path, tmp_path: Path, workers: Workers) -> None:
    """A model that was not taught the end of a turn is not trained on for hours."""
    settings = tiny.RL_SETTINGS.model_copy(update={"max_completion_tokens": 2})
    spec = tiny.spec("rl", chain / "base", chain / "rl.jsonl", rl=settings, chat=tiny.CHAT)
    spec = spec.model_copy(update={"rl": spec.settings.model_copy(update={"rollouts": "transformers"})})
    write_spec(tmp_path / "rl", spec)
    with pytest.raises(UserError, match=r"no completion of the first step ended within rl.max_completion_tokens = 2"):
        run_stage(tmp_path / "rl", workers)


def test_prompt_order() -> None:
    """Every row once before any is drawn again, in another order."""
    order = prompt_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order != prompt_order(5, 12, seed=2)
