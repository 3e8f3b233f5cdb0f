"""What is looked at before a suite starts: the command, the interpreter, local tasks and the model."""

import json
import stat
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from remit_megatron.benchmark.checks import check_model
from remit_megatron.benchmark.model import Model
from remit_megatron.benchmark.run import _hash_tasks
from remit_megatron.benchmark.suite import LM_EVAL_VERSION
from remit_megatron.cli import main
from remit_megatron.errors import UserError
from tests.benchmark import tiny
from tests.data_prep import tokenizers
from tests.hf import tiny as hf

STUB = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    print(json.dumps({probe}))
else:
    print(json.dumps([sys.argv[1:], os.environ.get("HF_ALLOW_CODE_EVAL")]))
    sys.exit("ValueError: no more today")
"""


def stub(path: Path, versions: dict[str, str], missing: list[str]) -> str:
    """An interpreter whose lm_eval fails, after it has said how it was called."""
    checked = {"differ": [], "begins": [], "finite": True, "why": None}
    path.write_text(STUB.format(python=sys.executable, probe={"versions": versions, "missing": missing, **checked}))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_code_runs_only_when_allowed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    python = stub(tmp_path / "python", {"lm_eval": LM_EVAL_VERSION}, [])
    out = tmp_path / "out"
    line = [
        "benchmark",
        str(model),
        "--suite",
        "base",
        "--output",
        str(out),
        "--python",
        python,
        "--tasks",
        "HE",
        "GPQA",
    ]
    assert main(line) == 1
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    assert tasks["HE"]["state"] == "not run"
    assert tasks["GPQA"]["state"] == "failed"
    assert tasks["GPQA"]["reason"].startswith("ValueError: no more today (its data are gated")
    assert not (out / "logs" / "humaneval.log").exists()
    arguments, allowed = json.loads((out / "logs" / "gpqa_main_n_shot.log").read_text().splitlines()[0])
    assert allowed is None
    assert "--confirm_run_unsafe_code" not in arguments
    assert main([*line, "--allow-code-execution"]) == 1
    arguments, allowed = json.loads((out / "logs" / "humaneval.log").read_text().splitlines()[0])
    assert allowed == "1"
    assert "--confirm_run_unsafe_code" in arguments
    arguments, allowed = json.loads((out / "logs" / "gpqa_main_n_shot.log").read_text().splitlines()[0])
    assert allowed is None, "only what runs code may"
    assert "2 tasks failed (GPQA, HE)" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and no output folder."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    for path in model.glob("*.safetensors*"):
        (bare / path.name).symlink_to(path)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in [*model.glob("*.safetensors*"), model / "config.json", model / "tokenizer.json"]:
        (plain / path.name).symlink_to(path)
    pythons = {
        "none": stub(tmp_path / "none", {}, []),
        "old": stub(tmp_path / "old", {"lm_eval": "0.4.9"}, []),
        "poor": stub(tmp_path / "poor", {"lm_eval": LM_EVAL_VERSION}, ["antlr4"]),
        "wrong": stub(tmp_path / "wrong", {"lm_eval": LM_EVAL_VERSION, "transformers": "5.12.1"}, []),
    }
    linked, elsewhere = tmp_path / "linked", tmp_path / "elsewhere"
    for folder in (linked, elsewhere):
        folder.mkdir()
    (elsewhere / "task.yaml").write_text("task: x\n")
    (linked / "mine").symlink_to(elsewhere)
    (linked / "own.yaml").write_text("task: y\n")
    misspelt = tmp_path / "misspelt"
    misspelt.mkdir()
    for name in ("own.yaml", "x.yml"):
        (misspelt / name).write_text("task: y\n")
    good, suite, out = str(model), ["--suite", "base"], ["--output", str(tmp_path / "out")]
    cases = {
        "needs MODEL, --suite, --output": [],
        "suite 'base' has no 'GSM8k', did you mean 'GSM8K'?": [good, *suite, *out, "--tasks", "GSM8k"],
        "suite 'base' has no 'zzz': it has GSM8K": [good, *suite, *out, "--tasks", "zzz"],
        "has no tokenizer (tokenizer.json": [str(bare), *suite, *out],
        "has no chat template": [str(plain), "--suite", "post", *out],
        "--like goes with a checkpoint": [good, *suite, *out, "--like", good],
        "is no folder with task files": [good, *suite, *out, "--include-path", str(model)],
        f"does not follow the link {linked / 'mine'}, and would leave its tasks out": [
            *(good, *suite, *out, "--include-path", str(linked))
        ],
        f"lm_eval reads .yaml alone, and would leave {misspelt / 'x.yml'} out": [
            *(good, *suite, *out, "--include-path", str(misspelt))
        ],
        "--batch-size 0": [good, *suite, *out, "--batch-size", "0"],
        "--set-gen-kwargs 'x': KEY=VALUE": [good, *suite, *out, "--set-gen-kwargs", "x"],
        "--set-model-args 'pretrained=x': KEY=VALUE is expected": [
            good,
            *suite,
            *out,
            "--set-model-args",
            "pretrained=x",
        ],
        "result of `remit benchmark` ": ["--table", str(model)],
        "--table prints results that are there": [good, "--table", str(model)],
        "cannot be started": [good, *suite, *out, "--python", str(tmp_path / "absent")],
        "is no folder: name another": [good, *suite, "--output", str(model / "config.json" / "x")],
        "lm_eval is not installed": [good, *suite, *out, "--python", pythons["none"]],
        "has lm_eval 0.4.9, and the suites are of 0.4.13": [good, *suite, *out, "--python", pythons["old"]],
        "lacks antlr4": [good, *suite, *out, "--python", pythons["poor"]],
        "splits OLMo 2's numbers wrongly": [good, *suite, *out, "--python", pythons["wrong"]],
    }
    for message, arguments in cases.items():
        assert main(["benchmark", *arguments]) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as unknown:
        main(["benchmark", good, "--suite", "pre", *out])
    assert unknown.value.code == 2


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(line) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_model_arguments_keep_their_types(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = stub(tmp_path / "python", {"lm_eval": LM_EVAL_VERSION}, [])
    pairs = ["a=4", "b=0.5", "c=True", "d=false", "e=auto"]
    line = ["benchmark", str(model), "--suite", "base", "--output", str(tmp_path / "out"), "--python", python]
    assert main([*line, "--tasks", "TQA", "--backend", "vllm", "--set-model-args", *pairs]) == 1
    arguments, _ = json.loads((tmp_path / "out" / "logs" / "truthfulqa_mc1.log").read_text().splitlines()[0])
    wanted = {"pretrained": str(model), "a": 4, "b": 0.5, "c": True, "d": False, "e": "auto"}
    assert json.loads(arguments[arguments.index("--model_args") + 1]) == wanted
    assert arguments[arguments.index("--batch_size") + 1] == "auto"
    assert "--apply_chat_template" not in arguments
    assert "--gen_kwargs" not in arguments
    more = ["--set-gen-kwargs", "max_gen_toks=512", "until=\\n"]
    assert main([*line[:5], str(tmp_path / "other"), *line[6:], "--tasks", "TQA", *more]) == 1
    arguments, _ = json.loads((tmp_path / "other" / "logs" / "truthfulqa_mc1.log").read_text().splitlines()[0])
    start = arguments.index("--gen_kwargs") + 1
    assert arguments[start : start + 2] == ["max_gen_toks=512", "until='\\\\n'"], "as literals of Python"
    kept = json.loads((tmp_path / "other" / "results.json").read_text())
    assert kept["settings"]["gen_kwargs"] == {"max_gen_toks": 512, "until": "\\n"}
    assert "with gen_kwargs = {}, now" in refused(
        [*line, "--backend", "vllm", "--set-model-args", *pairs, *more], capsys
    )


def test_a_checked_model(tmp_path: Path, model: Path) -> None:
    """What transformers makes of a Llama 2 kind of tokenizer: other splits and a first token, both said."""
    folder = tmp_path / "llama"
    tokenizers.save("sentencepiece", folder)
    hf.save(hf.make_model("llama", vocab_size=700), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (start,) = (token["id"] for token in content["added_tokens"] if token["content"] == "<s>")
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [start], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": template}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True, "legacy": True}))
    checked = check_model(sys.executable, "cpu", Model("m", "0", folder, None), folder, {"transformers": "5"})
    assert checked.record["begins_with"] == [start]
    assert checked.record["differ"] > 0
    assert "splits " in checked.warnings[0]
    assert f"prompts begin with the tokens [{start}]" in checked.warnings[1]


def test_a_model_without_finite_logits_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    tiny.save_model(folder, steps=0)
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights or logits are not finite"):
        check_model(sys.executable, "cpu", Model("m", "0", folder, None), folder, {})


def test_local_tasks_are_known_by_all_files(tmp_path: Path) -> None:
    """Data and templates beside the tasks decide figures too; caches of Python and hidden files do not."""
    known = set()
    for name in ("task.yaml", "utils.py", "few_shot.jsonl", "sub/prompt.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        known.add(_hash_tasks(tmp_path))
    assert len(known) == 4
    (tmp_path / "few_shot.jsonl").write_text("changed")
    changed = _hash_tasks(tmp_path)
    assert changed not in known
    (tmp_path / "__pycache__").mkdir()
    for name in ("__pycache__/utils.cpython-311.pyc", ".swp"):
        (tmp_path / name).write_text("")
    assert _hash_tasks(tmp_path) == changed
