"""What cannot be met is one line, before anything is trained; what an engine left is checked before it counts.

| refused | by |
|---|---|
| no chat template; no end of turn | test_chat |
| a constant reward | test_constant_reward |
| a verifier without its ground truth | test_rows |
| another vocabulary, type or tensor's name; a NaN | test_output, test_an_output_that_will_not_do (w) |
| a replaced parent | test_a_parent_that_was_replaced (w), test_a_kept_model_that_was_replaced (w) |
| two wheels, or stages, in one folder | test_two_wheels (w), test_folder_of_another_stage |
| a full disk: exit code 1, and the same command goes on | test_a_full_disk |

w: in tests/flywheel/test_wheel.py. A UserError is exit code 2 (test_command_line).
"""

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from remit_megatron.cli import main
from remit_megatron.errors import DamagedError, RunError, UserError
from remit_megatron.posttrain import data
from remit_megatron.posttrain.chat import make_input
from remit_megatron.posttrain.contract import (
    Chat,
    Engine,
    read_manifest,
    read_metrics,
    read_spec,
    verify,
    write_spec,
)
from remit_megatron.posttrain.output import accept
from remit_megatron.posttrain.prepare import prepare
from remit_megatron.posttrain.stage import run_stage
from remit_megatron.posttrain.tokens import IGNORED, ChatTokenizer
from tests import disks
from tests.posttrain import tiny

ENGINE = """
import json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
stage = Path(sys.argv[1])
spec = json.loads((stage / "stage.json").read_text())
out = stage / "work/out"
shutil.rmtree(out, ignore_errors=True)
shutil.copytree(stage / "work/in", out)
for shard in out.glob("*.safetensors"):
    tensors = load_file(shard)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
with (stage / "metrics.jsonl").open("w") as metrics:
    for step in range(1, 4):
        print(json.dumps({"step": step, "steps": 3, "loss": 1 / step}), file=metrics)
"""
USER, ANSWER = {"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base") / "model")


def check(tmp_path: Path, base: Path, kind: str, rows: list[Any], **changes: Any) -> None:
    spec = tiny.spec(kind, base, tiny.write_jsonl(tmp_path / "rows.jsonl", rows), **{"chat": tiny.CHAT, **changes})
    prepare(spec, make_input(spec, tmp_path / "in"))


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("sft", {"text": "x"}, r"row 9: column `messages` is missing \(it has text\)"),
    ("sft", {"messages": []}, "row 9: column `messages` is empty"),
    ("sft", {"messages": [USER]}, "row 9: messages does not end with an answer of the assistant"),
    ("sft", {"messages": [{"role": "human", "content": "x"}, ANSWER]}, "row 9: message 1 of messages has role 'human'"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": "5" * 60}]}, "row 9: .* sft.max_tokens = 64"),
    ("dpo", {"prompt": [USER], "chosen": [ANSWER]}, "row 9: column `rejected` is missing"),
    ("dpo", {"prompt": "x", "chosen": "y", "rejected": "z"}, "row 9: the rows before are messages"),
    ("dpo", {"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "row 9: chosen is not one answer"),
    ("dpo", {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5" * 60}]},
     "row 9: prompt and rejected answer is .* tokens long, and dpo.max_tokens = 64"),
    ("rl", {"prompt": [USER], "verifier": "gsm8k"}, "row 9: column `ground_truth` is missing"),
    ("rl", {"prompt": [USER], "ground_truth": "5"}, "row 9: names no verifier"),
    ("rl", {"prompt": [USER], "ground_truth": "five", "verifier": "gsm8k"},
     "row 9: verifier 'gsm8k' does not know the ground truth 'five'"),
    ("rl", {"prompt": [USER, ANSWER], "ground_truth": "5", "verifier": "gsm8k"}, "row 9: the prompt ends with"),
    ("rl", {"prompt": [{"role": "user", "content": "5" * 40}], "ground_truth": "5", "verifier": "gsm8k"},
     "row 9: the prompt is .* tokens long, and rl.max_prompt_tokens = 32"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "message"), BAD_ROWS)
def test_rows(tmp_path: Path, base: Path, kind: str, row: Any, message: str) -> None:
    good = {"sft": tiny.sft_rows, "dpo": tiny.dpo_rows, "rl": tiny.rl_rows}[kind](8)
    check(tmp_path, base, kind, good)
    with pytest.raises(UserError, match=message):
        check(tmp_path, base, kind, [*good, row])


def test_long_rows_are_dropped_on_request(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "5" * 60}]}
    settings = tiny.SFT_SETTINGS.model_copy(update={"too_long": "drop"})
    spec = tiny.spec("sft", base, tiny.write_jsonl(tmp_path / "rows.jsonl", [long, *tiny.sft_rows(8)]), sft=settings)
    assert len(prepare(spec, make_input(spec, tmp_path / "in")).ids) == 8
    assert "1 rows longer than sft.max_tokens are dropped" in capsys.readouterr().err


def test_constant_reward(tmp_path: Path, base: Path) -> None:
    """Data on which any answer earns the reward teach nothing; one row that tells answers apart is enough."""
    rows = [
        {"prompt": [USER], "ground_truth": {"instruction_id_list": [name], "kwargs": [kwargs]}, "verifier": "ifeval"}
        for name, kwargs in (
            ("keywords:forbidden_words", {"forbidden_words": ["xylophone"]}),
            ("punctuation:no_comma", {}),
        )
    ]
    check(tmp_path, base, "rl", [*rows[:1] * 4, rows[1]])
    with pytest.raises(UserError, match="row 1 and all others: the reward is constant: any answer earns it"):
        check(tmp_path, base, "rl", rows[:1] * 4)


@pytest.mark.parametrize(
    ("tokenizer", "chat", "message"),
    [
        ({"template": None}, Chat(end_of_turn=tiny.END), "has no chat template: give a jinja file as chat.template"),
        ({}, Chat(), "does not end an answer with the end-of-turn token '<|endoftext|>' .*'<|im_end|>"),
        ({}, Chat(end_of_turn="<|eot_id|>"), "chat.end_of_turn: the tokenizer has no token .*<|im_end|>"),
        ({"template": "{{ strftime_now('%d') }}" + tiny.TEMPLATE}, Chat(end_of_turn=tiny.END), "prints today's date"),
        ({"eos": ""}, Chat(), "names no eos_token"),
    ],
)
def test_chat(tmp_path: Path, tokenizer: dict[str, str], chat: Chat, message: str) -> None:
    base = tiny.save_base(tmp_path / "base", **tokenizer)
    with pytest.raises(UserError, match=message.replace("|", r"\|") if "<|" in message else message):
        check(tmp_path, base, "sft", tiny.sft_rows(8), chat=chat)


def test_answers_are_what_is_learned(tmp_path: Path, base: Path) -> None:
    """Labels are the answers of all turns with their ends, and nothing else."""
    spec = tiny.spec("sft", base, tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sft_rows(8)))
    chat = ChatTokenizer(make_input(spec, tmp_path / "in"))
    messages = [{"role": "system", "content": "sum"}, USER, ANSWER, {"role": "user", "content": "na\u00efve"},
                {"role": "assistant", "content": "\u65e5\u672c!"}]  # fmt: skip
    ids, labels = chat.conversation("row 1", messages)
    assert chat.tokenizer.decode(ids) == chat.text(messages)
    learned = chat.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == "5<|im_end|>\u65e5\u672c!<|im_end|>"


def test_forms_of_preferences() -> None:
    """Whole conversations, and an answer as text, are the same row."""
    other = {"role": "assistant", "content": "6"}
    wanted = {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}
    assert data.preference("", wanted) == wanted
    assert data.preference("", {"chosen": [USER, ANSWER], "rejected": [USER, other]}) == wanted
    assert data.preference("", {"prompt": "2+3", "chosen": [USER, ANSWER], "rejected": [USER, other]}) == wanted
    assert data.preference("", {"prompt": [USER], "chosen": "5", "rejected": "6"}) == wanted


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.zstd", ".JSONL.GZ"])
def test_archives_of_rows(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    pack = gzip.compress if ending.endswith("GZ") else zstandard.compress
    parts = [pack(b'{"prompt": "%d"}\n' % i * 40) for i in range(3)]  # as archives that were joined
    path.write_bytes(b"".join(parts))
    assert [row["prompt"] for _, row in data.read_rows(str(path))] == [str(i) for i in range(3) for _ in range(40)]
    path.write_bytes(b"".join(parts)[:-5])
    with pytest.raises(UserError, match=r"row \d+: cannot be read: "):
        list(data.read_rows(str(path)))
    path.write_bytes(parts[0][:6] + b"\xff" * 40)
    with pytest.raises(UserError, match=r"row 1: cannot be read: "):
        list(data.read_rows(str(path)))


def test_rows_of_an_editor_and_the_row_that_is_broken(tmp_path: Path) -> None:
    """A byte order mark is none of the text; the row named is the one that cannot be read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [row["prompt"] for _, row in data.read_rows(str(path))] == ["a", "b"]
    for broken, number in ((b"{", 2), (b"\xff", 2), (b"[1]", 2)):
        path.write_bytes(b'{"prompt": "a"}\n' + broken + b"\n")
        with pytest.raises(UserError, match=rf"row {number}: "):
            list(data.read_rows(str(path)))


def test_open_instruct_rows() -> None:
    row = {"messages": [USER], "ground_truth": ["5"], "dataset": ["gsm8k"]}
    found = data.problem("row 1", row, None)
    assert (found.prompt, found.ground_truth, found.verifier) == ([USER], "5", "gsm8k")


def stage(tmp_path: Path, base: Path, more: str = "", name: str = "stage") -> Path:
    """A stage of another engine, which multiplies the weights and then does `more`."""
    script = tmp_path / "engine.py"
    script.write_text(ENGINE + more)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sft_rows(8))
    engine = Engine(name="command", command=(sys.executable, str(script), "{stage}"))
    write_spec(tmp_path / name, tiny.spec("sft", base, rows, engine=engine))
    return tmp_path / name


def test_another_engine(tmp_path: Path, base: Path) -> None:
    """The result has the engine's weights and the base's tokenizer, with the end of turn that was asked for."""
    folder = stage(tmp_path, base, "(out / 'tokenizer_config.json').write_text('{}')\n(out / 'junk.bin').touch()\n")
    run_stage(folder)
    manifest = verify(folder)
    assert (manifest.steps, manifest.last["loss"]) == (3, 1 / 3)
    assert json.loads((folder / "model/tokenizer_config.json").read_text())["eos_token"] == tiny.END
    assert (folder / "model/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (folder / "model/junk.bin").exists()
    shard = next((folder / "model").glob("*.safetensors"))
    name, tensor = next(iter(load_file(shard).items()))
    assert torch.equal(tensor, load_file(base / shard.name)[name] * 1.5)
    run_stage(folder)  # finished: nothing runs
    assert read_manifest(folder) == manifest
    tokens = (folder / "model/config.json").read_bytes()
    (folder / "model/config.json").write_bytes(tokens.replace(b"3", b"4"))
    with pytest.raises(DamagedError, match=r"is not what stage sft left: config\.json has changed"):
        verify(folder)


def change_tensor(made: Path, change: Callable[[dict[str, torch.Tensor], str], None], index: bool = False) -> None:
    shard = sorted(made.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = min(tensors)
    change(tensors, name)
    save_file(tensors, shard, metadata={"format": "pt"})
    if index:
        path = made / "model.safetensors.index.json"
        path.write_text(path.read_text().replace(name, f"{name}x"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BAD_OUTPUTS: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "the engine left no Hugging Face folder here"),
    (lambda made: change_tensor(made, lambda t, n: t[n].fill_(float("nan"))), "holds values that are not finite"),
    (lambda made: change_tensor(made, lambda t, n: t.update({n: t[n].half()})), "of float16, and .* of float32"),
    (lambda made: change_tensor(made, lambda t, n: t.update({n: t[n][:-1].clone()})), "config.json asks for"),
    (lambda made: change_tensor(made, lambda t, n: t.update({f"{n}x": t.pop(n)}), index=True), "1 tensors are missing"),
    (lambda made: edit(made / "config.json", lambda c: c.update(vocab_size=296)), "vocab_size is 296, and 300 in"),
    (
        lambda made: edit(made / "config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        "norm_epsilon is 0.001, and 1e-06",
    ),
    (lambda made: edit(made / "tokenizer.json", lambda t: t["model"]["merges"].pop()), "tokenizer: another merges"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OUTPUTS)
def test_output(tmp_path: Path, base: Path, change: Callable[[Path], Any], message: str) -> None:
    """A model that is another one in anything but its weights' values is refused, and left where it was."""
    given = make_input(tiny.spec("sft", base, tiny.write_jsonl(tmp_path / "rows.jsonl", [1])), tmp_path / "in")
    shutil.copytree(given, tmp_path / "good")
    accept(tmp_path / "good", tmp_path / "model", given)
    made = Path(shutil.copytree(given, tmp_path / "out"))
    change(made)
    with pytest.raises(UserError, match=message):
        accept(made, tmp_path / "other", given)
    assert not (tmp_path / "other").exists()


def test_engine_that_fails(tmp_path: Path, base: Path) -> None:
    folder = stage(tmp_path, base, "sys.exit('no GPU here')")
    with pytest.raises(RunError, match=r"sft: no GPU here \(exit code 1, log in .*log.txt\)"):
        run_stage(folder)
    assert len(read_metrics(folder)) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", "16k") as disk:
        yield disk


def test_a_full_disk(tmp_path: Path, base: Path, small_disk: Path) -> None:
    """In what is written before the engine starts, and in the engine: one line each; with room the stage goes on."""
    script = tmp_path / "copy.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        "work = pathlib.Path(sys.argv[1]) / 'work'\n"
        "try:\n"
        "    shutil.rmtree(work / 'out', ignore_errors=True)\n"
        "    shutil.copytree(work / 'in', work / 'out')\n"
        "except shutil.Error as error:\n"
        "    sys.exit(f'{error.args[0][0][1]}: {error.args[0][0][2]}')\n"
    )
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sft_rows(8))
    engine = Engine(name="command", command=(sys.executable, str(script), "{stage}"))
    folder = small_disk / "stage"
    write_spec(folder, tiny.spec("sft", base, rows, engine=engine))
    with pytest.raises(RunError, match="work/in: cannot be written: No space left on device: free space there"):
        run_stage(folder)
    resize(small_disk, "160k")
    with pytest.raises(RunError, match=r"sft: .*work/out/.*No space left on device.* \(exit code 1, log in "):
        run_stage(folder)
    assert not (folder / "model").exists()
    resize(small_disk, "2m")
    run_stage(folder)
    verify(folder)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_folder_of_another_stage(tmp_path: Path, base: Path) -> None:
    folder = stage(tmp_path, base)
    spec = read_spec(folder)
    write_spec(folder, spec)
    with pytest.raises(UserError, match=r"holds another stage \(seed = 0 there, 3 here\)"):
        write_spec(folder, spec.model_copy(update={"seed": 3}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no stage"):
        write_spec(tmp_path / "other", spec)


def test_changed_data(tmp_path: Path, base: Path) -> None:
    folder = stage(tmp_path, base)
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sft_rows(9))
    with pytest.raises(UserError, match=r"data: .*rows.jsonl: its content is not what stage sft was asked for"):
        run_stage(folder)


STAGE = """
run = "{run}"
model = "{base}"
data = ["{rows}"]
chat.end_of_turn = "<|im_end|>"
engine.name = "command"
engine.command = ["{python}", "{script}", "{{stage}}"]
[sft]
peak_lr = 1e-3
batch_samples = 8
max_tokens = 64
"""


def test_command_line(tmp_path: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit codes of `remit post`, and that a changed base is noticed."""
    stage(tmp_path, base)
    rows, script, toml = tmp_path / "rows.jsonl", tmp_path / "engine.py", tmp_path / "stage.toml"
    copy = tiny.save_base(tmp_path / "copy")
    text = STAGE.format(run=tmp_path / "run", base=copy, rows=rows, python=sys.executable, script=script)
    toml.write_text(text)
    assert main(["post", "sft", str(toml)]) == 0
    assert re.search(r"run/model: 3 steps in \d+ s, identity [0-9a-f]{16}", capfd.readouterr().out)
    assert main(["post", "sft", str(toml), "--set", "sft.peak_lrs=1"]) == 2
    assert "unknown key sft.peak_lrs, did you mean peak_lr?" in capfd.readouterr().err
    assert main(["post", "sft", str(toml), "--set", "sft.peak_lr=1e-4"]) == 2
    assert "holds another stage (sft.peak_lr = 0.001 there, 0.0001 here)" in capfd.readouterr().err
    assert main(["post", "dpo", str(toml)]) == 2
    assert "kind = 'dpo': section [sft] does not belong there" in capfd.readouterr().err
    shard = sorted(copy.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert main(["post", "sft", str(toml)]) == 2
    assert "holds another stage (parents.model = " in capfd.readouterr().err
