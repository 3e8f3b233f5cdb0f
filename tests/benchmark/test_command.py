"""`remit benchmark`: the real lm_eval on a real model, offline, against figures computed with transformers alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from remit_megatron.cli import main
from remit_megatron.data.files import locked
from remit_megatron.hf.folder import HFFolder
from tests.benchmark import tiny

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
LM_EVAL = lm_eval.__path__[0]
REMIT = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]


def documented_task(data: Path) -> str:
    """The task file that docs/evaluation.md shows, with this machine's paths."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return text.replace("include: LM_EVAL", f"include: {LM_EVAL}").replace("/data/", f"{data}/")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and task files. The data of TruthfulQA are not there."""
    root = tmp_path_factory.mktemp("benchmark")
    tiny.save_model(root / "model", steps=140)
    tiny.save_model(root / "other", steps=0)
    tiny.write_data(root / "data")
    (root / "tasks").mkdir()
    gsm8k = documented_task(root / "data")
    (root / "tasks" / "gsm8k.yaml").write_text(gsm8k)
    files = ", ".join(f"{split}: {root}/data/arc/{split}.jsonl" for split in ("train", "validation", "test"))
    arc = f"dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files: {{{files}}}\n"
    for name in ("arc_challenge", "arc_challenge_chat"):
        text = f"include: {LM_EVAL}/tasks/arc/{name}.yaml\ntask: {name}\n{arc}"
        (root / "tasks" / f"{name}.yaml").write_text(text)
    return root


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*REMIT, "benchmark", *arguments, "--include-path", str(root / "tasks")]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["tasks"]


NAMED = ("--suite", "base", "--tasks", "ARC-C", "gsm8k", "TQA", "HE")


@pytest.fixture(scope="module")
def killed(root: Path) -> dict[str, Any]:
    """An evaluation that is killed when its first task is done; its tasks as they were then."""
    output = root / "out"
    command = [*REMIT, "benchmark", str(root / "model"), *NAMED, "--output", str(output)]
    with (root / "killed.log").open("w") as log:
        first = subprocess.Popen(
            [*command, "--include-path", str(root / "tasks")], stdout=log, stderr=log, env=environment()
        )
        while first.poll() is None and not (output / "logs" / "truthfulqa_mc1.log").exists():
            time.sleep(0.05)
        assert first.poll() is None, (root / "killed.log").read_text()
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        first.kill()
        first.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/exe").exists() for child in children), "lm_eval dies with the command"
    return read(output)


@pytest.fixture(scope="module")
def evaluated(root: Path, killed: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The same evaluation, gone on with."""
    return run(root, str(root / "model"), *NAMED, "--output", str(root / "out"))


def test_killed_evaluation_goes_on(
    root: Path, killed: dict[str, Any], evaluated: subprocess.CompletedProcess[str]
) -> None:
    assert {name: task["state"] for name, task in killed.items()} == {"GSM8K": "done", "HE": "not run"}
    tasks = read(root / "out")
    assert tasks["GSM8K"] == killed["GSM8K"], "a finished task is kept"
    assert "1 of 3 tasks are there already" in evaluated.stderr
    assert "[1/2] TQA" in evaluated.stderr


def test_failing_task_costs_only_itself(root: Path, evaluated: subprocess.CompletedProcess[str]) -> None:
    tasks = read(root / "out")
    assert {name: task["state"] for name, task in tasks.items()} == {
        "GSM8K": "done",
        "HE": "not run",
        "TQA": "failed",
        "ARC-C": "done",
    }
    assert evaluated.returncode == 1
    assert "truthful_qa" in tasks["TQA"]["reason"], "lm_eval's last line says which data it could not have"
    assert f"TQA: FAILED: {tasks['TQA']['reason']}" in evaluated.stderr
    assert evaluated.stderr.splitlines()[-1].startswith("remit: 1 tasks failed (TQA)")
    assert "--allow-code-execution" in tasks["HE"]["reason"]
    assert "no average; not evaluated: MATH, GPQA" in evaluated.stdout


@pytest.fixture(scope="module")
def second_opinion(root: Path) -> Any:
    """(model, encode): transformers and tokenizers, nothing of lm_eval."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(root / "model" / "tokenizer.json"))
    return model, tokenizer


@torch.no_grad()
def test_choices_by_likelihood(
    root: Path, evaluated: subprocess.CompletedProcess[str], second_opinion: tuple[Any, Any]
) -> None:
    """Each choice's log-likelihood after 25 examples; the largest counts, and the largest a character."""
    model, tokenizer = second_opinion
    shots = (tiny.choice_text(tiny.CHOICE_SHOT, tiny.right(tiny.CHOICE_SHOT)) + "\n\n") * 25
    by_sum, by_character = 0, 0
    for item in tiny.CHOICES:
        sums = []
        for i in range(4):
            start = len(tokenizer.encode(shots + tiny.choice_text(item, None)).ids)
            ids = torch.tensor(tokenizer.encode(shots + tiny.choice_text(item, i)).ids)
            logp = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(logp[:-1].gather(1, ids[1:, None])[start - 1 :].sum())
        lengths = torch.tensor([len(text) for text in item["choices"]["text"]])
        by_sum += int(torch.stack(sums).argmax()) == tiny.right(item)
        by_character += int((torch.stack(sums) / lengths).argmax()) == tiny.right(item)
    task = read(root / "out")["ARC-C"]
    metrics = task["metrics"]
    assert metrics["acc,none"]["value"] == by_sum / 20
    assert metrics["acc_norm,none"]["value"] == by_character / 20
    assert by_sum != by_character
    assert (task["items"], task["few_shot"], task["shortened"]) == (20, 25, 0)
    share = by_sum / 20
    assert metrics["acc,none"]["stderr"] == pytest.approx((share * (1 - share) / 19) ** 0.5)


@torch.no_grad()
def test_answers_by_greedy_decoding(
    root: Path, evaluated: subprocess.CompletedProcess[str], second_opinion: tuple[Any, Any]
) -> None:
    """256 tokens after 8 examples, up to the next question; the number behind ####, or the last one, is the answer."""
    model, tokenizer = second_opinion
    shots = (tiny.sum_text(tiny.SUM_SHOT) + "\n\n") * 8
    strict, flexible, cut = 0, 0, 0
    for item in tiny.SUMS:
        ids = tokenizer.encode(shots + tiny.sum_text(item, answered=False)).ids
        start = len(ids)
        for _ in range(256):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            text = tokenizer.decode(ids[start:])
            if ids[-1] == 0 or "Question:" in text:
                break
        text = tokenizer.decode(ids[start:]).split("Question:")[0]
        cut += len(tokenizer.encode(text).ids) >= 256 - 2
        answer = item["answer"].removeprefix("#### ")
        strict += (re.findall(r"#### (-?[0-9.,]+)", text) or [""])[0] == answer
        flexible += (re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text) or [""])[-1] == answer
    task = read(root / "out")["GSM8K"]
    assert task["metrics"]["exact_match,strict-match"]["value"] == strict / 12
    assert task["metrics"]["exact_match,flexible-extract"]["value"] == flexible / 12
    assert 0 < strict < 12
    assert (task["items"], task["few_shot"]) == (12, 8)
    assert (task["max_gen_toks"], task["cut"]) == (256, cut)
    assert task["remarks"][0] == "12 items, the paper's test set has 1,319"
    assert [f"{cut} of 12 answers end after 256 tokens" in text for text in task["remarks"][1:]] == [True] * (cut > 0)
    assert task["caveats"] == ["the examples are drawn anew for another number of ranks"]
    checks = json.loads((root / "out" / "results.json").read_text())["checks"]
    assert (checks["differ"], checks["begins_with"], checks["warnings"]) == (0, [], [])
    assert str(root / "data" / "gsm8k" / "test.jsonl") in task["data"][0]


def test_checkpoint_gives_the_figures_of_its_folder(root: Path, evaluated: subprocess.CompletedProcess[str]) -> None:
    """Imported, exported again by the command, and evaluated: the same weights, and to the digit the same figures.

    Then as what a run has kept, into the same results: nothing is left to do, and the export goes.
    """
    done = subprocess.run(
        [*REMIT, "convert", "import", str(root / "model"), str(root / "checkpoint")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checkpoints = root / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (root / "checkpoint").rename(checkpoints / "step-00000000")
    what = ("--suite", "base", "--tasks", "ARC-C", "--like", str(root / "model"), "--output")
    done = run(root, str(checkpoints / "step-00000000"), *what, str(root / "of run" / "step-00000000"))
    assert done.returncode == 0, done.stderr
    (exported,) = (root / "of run" / "step-00000000").glob("model-*")
    ours, theirs = (dict(iter(HFFolder(folder))) for folder in (exported, root / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = (read(folder)["ARC-C"] for folder in (root / "of run" / "step-00000000", root / "out"))
    assert {k: a[k] for k in ("metrics", "items", "few_shot")} == {k: b[k] for k in ("metrics", "items", "few_shot")}
    (checkpoints / "step-00000000" / "KEEP").touch()
    done = run(root, str(root / "run"), "--kept", *what, str(root / "of run"))
    assert done.returncode == 0, done.stderr
    assert "1 of 1 tasks are there already" in done.stderr
    assert not exported.exists()
    standing = json.loads((root / "of run" / "step-00000000" / "results.json").read_text())["model"]["checkpoint"]
    assert (standing["run"], standing["step"], standing["tokens"]) == (str(root / "run"), 0, 0)


def test_remarks_of_a_chat_model(root: Path) -> None:
    """Through the chat template, with a limit and a context that the prompts do not fit into: both are said."""
    output = root / "post"
    command = [str(root / "model"), "--suite", "post", "--tasks", "ARC-C", "--output", str(output), "--limit", "3"]
    done = run(root, *command, "--set-model-args", "max_length=128", "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    task = read(output)["ARC-C"]
    assert (task["items"], task["few_shot"], task["shortened"]) == (3, 0, 3)
    assert "limited to 3 items: not comparable" in task["remarks"]
    assert any("lost their beginning (3 warnings in logs/arc_challenge_chat.log)" in text for text in task["remarks"])
    assert done.stderr.count("WARNING: ") == 3
    assert re.search(r"\| \d+\.\d\d\* \|", done.stdout)
    (raw,) = (output / "lm_eval").rglob("results_*.json")
    assert json.loads(raw.read_text())["chat_template"] == tiny.TEMPLATE


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_other_model_or_settings_in_one_folder(
    root: Path, evaluated: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "out" / "results.json").read_bytes()
    tasks, rest = ["--include-path", str(root / "tasks")], ["--suite", "base", "--output", str(root / "out")]
    assert "results of another model (" in refusal(capsys, str(root / "other"), *rest, *tasks)
    model = str(root / "model")
    assert "with limit = null, now 5" in refusal(capsys, model, *rest, *tasks, "--limit", "5")
    assert "with local_tasks = " in refusal(capsys, model, *rest)
    assert "with model_args = {}, now" in refusal(capsys, model, *rest, *tasks, "--set-model-args", "max_length=9")
    assert "with suite = " in refusal(capsys, model, "--suite", "post", *rest[2:], *tasks)
    with locked(root / "out" / ".lock"):
        assert "another process evaluates into" in refusal(capsys, model, *rest, *tasks)
    assert (root / "out" / "results.json").read_bytes() == before


def test_a_run_that_keeps_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, str(tmp_path), "--kept", "--suite", "base", "--output", str(tmp_path / "out"))
    assert f"--kept: {tmp_path} has no checkpoint that it keeps: set checkpoint.keep_every_tokens" in said


def test_signal_ends_the_command_and_its_task(root: Path) -> None:
    output = root / "stopped"
    command = [str(root / "model"), "--suite", "base", "--tasks", "GSM8K", "--output", str(output)]
    process = subprocess.Popen(
        [*REMIT, "benchmark", *command, "--include-path", str(root / "tasks")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while process.poll() is None and not (output / "logs" / "gsm8k.log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the same command goes on" in error.splitlines()[-1]
    assert read(output) == {}
