"""docs/posttraining.md, the recipes and the adapters say what the code takes."""

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from remit_megatron.cli import build_parser, main
from remit_megatron.posttrain.contract import DataFile
from remit_megatron.posttrain.stage_file import StageFile
from remit_megatron.posttrain.tokens import ChatTokenizer
from remit_megatron.posttrain.verifiers import VERIFIERS
from tests.posttrain import tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/posttraining.md").read_text()
RECIPES = sorted((ROOT / "launch/recipes/post").glob("*.toml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """Each is a stage file of the one kind that its name says, with a source."""
    stage = StageFile.model_validate_json(json.dumps(tomllib.loads(path.read_text())))
    kind = {"apo": "dpo"}.get(path.stem.rpartition("_")[2], path.stem.rpartition("_")[2])
    assert [name for name in ("sft", "dpo", "rl") if getattr(stage, name)] == [kind]
    assert re.search(r"\((open-instruct|huggingface/smollm),", path.read_text())
    if kind == "sft":
        assert "5e-6 keeps it" in path.read_text()
    if stage.chat.template:
        assert (ROOT / stage.chat.template).is_file()


@pytest.mark.parametrize(("name", "end"), [("olmo2", tiny.EOD), ("chatml", tiny.END)])
def test_templates(tmp_path: Path, name: str, end: str) -> None:
    """The recipes' templates pass the check, and learn an answer with its end."""
    tiny.save_tokenizer(tmp_path / "t", template=(ROOT / f"launch/recipes/post/{name}.jinja").read_text(), eos=end)
    chat = ChatTokenizer(tmp_path / "t")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    ids, labels = chat.conversation("row 1", messages)
    assert chat.tokenizer.decode([label for label in labels if label >= 0]) == f"b{end}b{end}"
    start = {"olmo2": f"{tiny.EOD}<|user|>\na\n<|assistant|>\nb", "chatml": "<|im_start|>user\na<|im_end|>\n"}[name]
    assert chat.tokenizer.decode(ids).startswith(start)


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands parse, the one that makes data runs, and its stage files are valid."""
    lines = [shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines()]
    assert [words[1:3] for words in lines] == [
        ["convert", "export"],
        *(["post", x] for x in ("sft", "dpo", "rl", "data")),
    ]
    for words in lines:
        build_parser().parse_args(words[1:])
        assert all((ROOT / word).exists() for word in words if word.endswith(".toml"))
    monkeypatch.chdir(tmp_path)
    assert main(lines[-1][1:]) == 0
    first, engine = (tomllib.loads(block) for block in blocks("toml"))
    assert Path(first["data"][0]).exists(), "the stage on the page is of the data made above"
    rows = len(Path(first["data"][0]).read_text().splitlines())
    assert rows == 200
    StageFile.model_validate_json(json.dumps(first))
    StageFile.model_validate_json(json.dumps({**first, **engine}))
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert named >= VERIFIERS.keys() | {"cached", "transformers", "vllm", "sft", "dpo", "rl"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/engines/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(kind: str, **changes: Any) -> dict[str, Any]:
    file = DataFile(path="rows.jsonl", sha256="0")
    return tiny.spec(kind, Path("m"), Path("/dev/null"), data=(file,), **changes).model_dump(mode="json")


def test_verl_adapter(tmp_path: Path) -> None:
    """Rows in verl's columns, rewards by the verifiers, checkpoints where models are kept, metrics once a step."""
    from pyarrow import parquet

    verl = load("verl_rl")
    spec = request("rl", keep=(0.25, 0.5))
    spec["data"] = [{"path": str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rl_rows(4)))}]
    verl.write_parquet(spec, tmp_path / "train.parquet")
    row = parquet.read_table(tmp_path / "train.parquet").to_pylist()[0]
    question, answer = tiny.sums(4, 2)[0]
    assert row["prompt"] == [{"role": "user", "content": question}]
    assert verl.compute_score(row["data_source"], answer, row["reward_model"]["ground_truth"]) == 1
    assert verl.compute_score(row["data_source"], "none", row["reward_model"]["ground_truth"]) == 0
    settings = verl.overrides(spec, tmp_path)
    assert verl.keep_steps(spec) == {"025": 2, "050": 4}
    assert settings["trainer.save_freq"] == 2
    assert (settings["data.train_batch_size"], settings["actor_rollout_ref.rollout.n"]) == (4, 8)
    log = [{"step": 1, "data": {"a": 1.0}}, {"step": 2, "data": {"a": 2.0, "b": "text"}}, {"step": 2, "data": {"a": 3}}]
    verl.copy_metrics(tiny.write_jsonl(tmp_path / "verl.jsonl", log), tmp_path, 8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"a": 1.0, "step": 1, "steps": 8}, {"a": 3, "step": 2, "steps": 8}]


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_verl_takes_the_settings(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module

    overrides = load("verl_rl").overrides(request("rl"), tmp_path)
    with initialize_config_module("verl.trainer.config", version_base=None):
        compose("ppo_trainer", [f"{key}={value}" for key, value in overrides.items()])


def test_open_instruct_adapter(tmp_path: Path) -> None:
    line = load("open_instruct_sft").arguments(request("sft"), tmp_path)
    named = dict(zip(line[::2], line[1::2], strict=False))
    assert named["--learning_rate"] == "0.003"
    assert named["--do_not_randomize_output_dir"] == "True"
    assert line[-3:] == ["--dataset_mixer_list", str(Path("rows.jsonl").absolute()), "1.0"]
