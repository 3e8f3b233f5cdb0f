"""docs/posttraining.md, the recipes and the adapters say what the code takes."""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import tomllib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from remit_megatron.cli import build_parser, main
from remit_megatron.posttrain.chat import make_input
from remit_megatron.posttrain.contract import DataFile, Engine, write_spec
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


ENDLESS = tiny.RL_SETTINGS.model_copy(update={"must_stop": False})


def test_verl_adapter(tmp_path: Path) -> None:
    """Rows in verl's columns, rewards by the verifiers, checkpoints where models are kept, metrics once a step."""
    from pyarrow import parquet

    verl = load("verl_rl")
    spec = request("rl", keep=(0.25, 0.5), rl=ENDLESS)
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
    first = [{"step": 1, "data": {"a": 1.0}}, {"step": 2, "data": {"a": 2.0, "b": "text"}}]
    logs = [tiny.write_jsonl(tmp_path / "verl-000.jsonl", first)]
    logs += [tiny.write_jsonl(tmp_path / "verl-001.jsonl", [{"step": 2, "data": {"a": 3}}])]
    with logs[0].open("a") as stream:
        stream.write('{"step": 3, "da')
    verl.copy_metrics(logs, tmp_path, 8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"a": 1.0, "step": 1, "steps": 8}, {"a": 3, "step": 2, "steps": 8}]


def package(variable: str) -> Path:
    """The files of an engine's package, which are not installed beside this one: its pins are others."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a folder with the engine's files: docs/posttraining.md, Another engine")
    return Path(os.environ[variable])


def test_verl_takes_the_settings(tmp_path: Path) -> None:
    """$VERL: a folder with the package `verl`, as its wheel unpacks. Its own settings, composed by hydra, which refuses
    a key that they lack; values of their types and of its own names."""
    hydra = pytest.importorskip("hydra", reason="hydra-core, by which verl reads its settings, is not installed")
    source = package("VERL") / "verl"
    adapter = load("verl_rl")
    for loss in ("grpo", "dapo", "dr_grpo"):
        spec = request("rl", rl=ENDLESS.model_copy(update={"loss": loss, "kl": 0.1}))
        overrides = adapter.overrides(spec, tmp_path)
        with hydra.initialize_config_dir(str((source / "trainer/config").absolute()), version_base=None):
            plain = hydra.compose("ppo_trainer", ["actor_rollout_ref.rollout.name=vllm"])
            found = hydra.compose("ppo_trainer", [f"{key}={value}" for key, value in overrides.items()])
        for key in overrides:
            values = [functools.reduce(lambda at, part: at[part], key.split("."), one) for one in (plain, found)]
            if values[0] is not None and not {type(one) for one in values} <= {int, float}:
                assert type(values[0]) is type(values[1]), f"{key}: {values}"
        mode = found.actor_rollout_ref.actor.loss_agg_mode
        assert f'"{mode}"' in (source / "trainer/ppo/core_algos.py").read_text()
    engine = (source / "workers/engine/fsdp/transformer_impl.py").read_text()
    assert "optimizer_config.clip_grad" in engine
    assert "VERL_FILE_LOGGER_PATH" in (source / "utils/tracking.py").read_text()
    assert '"hf_model"' in (source / "utils/checkpoint/checkpoint_manager.py").read_text()
    assert (source / "trainer/main_ppo.py").is_file()


def test_verl_adapter_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = ENDLESS.model_copy(update={"schedule": "linear"})
    for settings, said in ((tiny.RL_SETTINGS, "set rl.must_stop = false"), (linear, "constant and cosine")):
        with pytest.raises(SystemExit, match="2"):
            load("verl_rl").overrides(request("rl", rl=settings), tmp_path)
        assert said in capsys.readouterr().err


def test_open_instruct_adapter(tmp_path: Path) -> None:
    line = load("open_instruct_sft").arguments(request("sft"), tmp_path)
    named = dict(zip(line[::2], line[1::2], strict=False))
    assert named["--learning_rate"] == "0.003"
    assert named["--do_not_randomize_output_dir"] == "True"
    assert line[-3:] == ["--dataset_mixer_list", str(Path("rows.jsonl").absolute()), "1.0"]


def definitions(path: Path, name: str) -> type:
    """A dataclass of a file with its fields and none of its methods: the file's imports are not to be had here."""
    classes = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    found = next(node for node in classes if node.name == name)
    found.body = [node for node in found.body if isinstance(node, ast.AnnAssign | ast.Assign)]
    constants = {node.id for node in ast.walk(found) if isinstance(node, ast.Name) and node.id.isupper()}
    known = {"os": os, "dataclass": dataclasses.dataclass, "field": dataclasses.field, "Literal": typing.Literal}
    names: dict[str, Any] = {**known, **dict.fromkeys(constants, "text"), "__file__": str(path), "__name__": __name__}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    kind = names[name]
    assert isinstance(kind, type)
    return kind


def test_open_instruct_takes_the_command_line(tmp_path: Path) -> None:
    """$OPEN_INSTRUCT: its clone. The arguments that finetune.py declares, read by what its own parser derives from."""
    clone = package("OPEN_INSTRUCT") / "open_instruct"
    from transformers import HfArgumentParser

    kinds = [definitions(clone / "finetune.py", "FlatArguments")]
    kinds += [definitions(clone / "dataset_transformation.py", "TokenizerConfig")]
    adapter = load("open_instruct_sft")
    for schedule in ("constant", "linear", "cosine"):
        settings = tiny.SFT_SETTINGS.model_copy(update={"schedule": schedule, "warmup_share": 0.1, "packing": True})
        spec = request("sft", sft=settings)
        arguments, tokenizer = HfArgumentParser(kinds).parse_args_into_dataclasses(adapter.arguments(spec, tmp_path))
        assert arguments.lr_scheduler_type == {"constant": "constant_with_warmup"}.get(schedule, schedule)
        assert (arguments.learning_rate, arguments.warmup_ratio, arguments.packing) == (3e-3, 0.1, True)
        assert (arguments.push_to_hub, arguments.try_launch_beaker_eval_jobs) == (False, False)
        assert arguments.dataset_mixer_list == [str(Path("rows.jsonl").absolute()), "1.0"]
        assert tokenizer.tokenizer_name_or_path == str(tmp_path / "work/in")
        assert tokenizer.chat_template_name is None, "the model's own"


def test_open_instruct_adapter_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What finetune.py would do in silence, before it starts; and rows that it would cut."""
    adapter = load("open_instruct_sft")
    monkeypatch.setattr(adapter, "GPUS", 2)
    base = tiny.save_base(tmp_path / "base", dtype=torch.bfloat16, eos=tiny.END)
    assert adapter.refusal(request("sft"), base) is None

    def sft(**changes: Any) -> dict[str, Any]:
        return request("sft", sft=tiny.SFT_SETTINGS.model_copy(update=changes))

    for spec, said in (
        (sft(schedule="cosine", min_lr_share=0.1), "leave out sft.min_lr_share"),
        (sft(too_long="drop"), "cuts rows"),
        (sft(microbatch_samples=3), "no multiple of sft.microbatch_samples x 2 GPUs"),
        (request("sft", keep=(0.5,)), "leave out `keep`"),
        (request("sft") | {"data": [{"path": "rows.jsonl.gz"}]}, "unpack the data"),
    ):
        assert said in adapter.refusal(spec, base)
    pad = tiny.save_base(tmp_path / "pad", dtype=torch.bfloat16)
    assert "would add a token <pad>" in adapter.refusal(request("sft"), pad)
    assert "the model's are float32" in adapter.refusal(request("sft"), tiny.save_base(tmp_path / "wide", eos=tiny.END))
    long = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "5" * 80}]}
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.sft_rows(8), long])
    asked = tiny.spec("sft", base, rows, engine=Engine(name="command", command=("true",)))
    write_spec(tmp_path / "stage", asked)
    make_input(asked, tmp_path / "stage/work/in")
    monkeypatch.setenv("OPEN_INSTRUCT", str(tmp_path))
    assert adapter.main(tmp_path / "stage") == 2
    assert "row 9: the conversation is" in capsys.readouterr().err
