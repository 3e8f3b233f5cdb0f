"""The wheel's bookkeeping, on real mid-training and an engine that is not TRL."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.data.files import locked
from remit_megatron.errors import RunError, UserError
from remit_megatron.flywheel.config import load_wheel
from remit_megatron.flywheel.places import run_only
from remit_megatron.flywheel.run import run_wheel
from remit_megatron.flywheel.state import lock_of
from remit_megatron.hf import tokenizer
from remit_megatron.posttrain.contract import read_manifest, write_manifest
from tests.flywheel import wheels

NAMES = ["r0-mid", "r0-sft", "r0-rl", "r1-remit-mid", "r1-remit-sft", "r1-remit-rl"]
Copied = Callable[[], Path]


def run(file: Path, until: str | None = None) -> None:
    run_wheel(file, load_wheel(file), until)


def change(root: Path, section: str, **values: Any) -> Path:
    content = wheels.settings(root)
    content.setdefault(section, {}).update(values)
    return wheels.write_wheel(root, content)


def words(file: Path) -> dict[str, str]:
    return {name: state.word for name, state in wheels.states(file).items()}


def test_finished(finished: Path) -> None:
    """Every stage is done, in the contract's shape, and is not run again; a model has a card and the base's tokens."""
    file = finished / "wheel.toml"
    assert words(file) == dict.fromkeys(NAMES, "done")
    before = {path: path.stat().st_mtime_ns for path in (finished / "wheel" / "stages").rglob("*") if path.is_file()}
    run(file)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    base = tokenizer.read_canonical(finished / "base")
    for name, node in wheels.nodes(file).items():
        model, manifest = node.folder / "model", read_manifest(node.folder)
        assert manifest is not None
        assert (node.folder / "stage.json").exists()
        assert len((node.folder / "metrics.jsonl").read_text().splitlines()) == manifest.steps > 0
        assert tokenizer.read_canonical(model) == base
        card = (model / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "\nlicense: apache-2.0\n" in card
        assert f"\n# {name}\n" in card
        for role, source in node.parents.items():
            assert f"| {role} | {source.name} | `{manifest.parents[role]}` |" in card
    guided = wheels.nodes(file)["r1-remit-mid"]
    assert [source.name for source in guided.parents.values()] == ["base", "r0-rl"]
    assert "ref_nll" in (guided.folder / "metrics.jsonl").read_text()
    assert not (wheels.nodes(file)["r0-rl"].folder / "work" / "checkpoint-00002").exists()


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed(every: int, finished: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment in each stage and between two: the same command ends with the same models.

    every: of the moments, the first of so many.
    """
    root = tmp_path / "killed"
    file = wheels.make_files(root)
    stages = {name: node.folder for name, node in wheels.nodes(file).items()}
    moments = [
        stages["r0-mid"] / "work/run/checkpoints/latest",
        stages["r0-mid"] / "work/out",
        stages["r0-mid"] / "manifest.json",
        stages["r0-sft"] / "work/checkpoint-00002",
        stages["r0-sft"] / "manifest.json",
        stages["r0-rl"] / "work/checkpoint-00006",
        stages["r0-rl"] / "model",
        stages["r1-remit-mid"] / "work/run/checkpoints/latest",
        stages["r1-remit-mid"] / "manifest.json",
        stages["r1-remit-rl"] / "work/keep/050",
    ]
    draw = random.Random(1)
    for moment in moments[::every]:
        with (root / "log").open("ab") as log:
            process = subprocess.Popen(wheels.command(file, "run"), stdout=log, stderr=log, env=wheels.environment())
        deadline = time.monotonic() + 900
        while not moment.exists():
            assert process.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, f"{moment}: {(root / 'log').read_text()}"
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.wait()
    wheels.remit(file, "run")
    assert words(file) == dict.fromkeys(NAMES, "done")
    assert wheels.identities(file) == wheels.identities(finished / "wheel.toml")
    for name, folder in stages.items():
        theirs = wheels.nodes(finished / "wheel.toml")[name].folder
        ours = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert ours == [json.loads(line)["loss"] for line in (theirs / "metrics.jsonl").read_text().splitlines()], name


def test_stopped_and_asked_to_stop(copied: Copied) -> None:
    """SIGTERM ends the command with 75 after the engine's; status says where it stands."""
    root = copied()
    file = change(root, "rl", steps=200)
    process = subprocess.Popen(wheels.command(file, "run", "--until", "r0-rl"), env=wheels.environment())
    metrics = wheels.nodes(file)["r0-rl"].folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert wheels.states(file)["r0-rl"].word == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    state = wheels.states(file)["r0-rl"]
    assert state.word == "stopped"
    assert state.why.startswith("step ")


def test_a_changed_setting(copied: Copied) -> None:
    """Reruns what depends on it and nothing else, and what was there before serves when it is changed back."""
    root = copied()
    file = change(root, "rl", peak_lr=2e-3)
    states = wheels.states(file)
    assert {name: state.word for name, state in states.items()} == {
        "r0-mid": "done",
        "r0-sft": "done",
        **dict.fromkeys(NAMES[2:], "stale"),
    }
    assert states["r0-rl"].why == "changed: rl.peak_lr = 0.001 before, 0.002"
    assert states["r1-remit-mid"].why == "follows r0-rl"
    stages = root / "wheel" / "stages"
    before = set(stages.iterdir())
    run(file, "r0-rl")
    (new,) = (path for path in set(stages.iterdir()) - before if path.is_dir())
    assert new == wheels.nodes(file)["r0-rl"].folder
    assert words(file)["r0-rl"] == "done"
    wheels.write_wheel(root, wheels.settings(root))
    assert words(file) == dict.fromkeys(NAMES, "done")
    assert f"kept for when it is one again: {new.name}" in wheels.remit(file, "status")


def test_a_changed_datum(copied: Copied) -> None:
    root = copied()
    file = root / "wheel.toml"
    os.rename(root / "sft.jsonl", root / "moved.jsonl")
    content = wheels.settings(root)
    content["sft"]["data"] = [str(root / "moved.jsonl")]
    wheels.write_wheel(root, content)
    assert words(file) == dict.fromkeys(NAMES, "done"), "where a file lies does not count"
    with (root / "moved.jsonl").open("a") as stream:
        stream.write("{}\n")
    states = wheels.states(file)
    assert [state.word for state in states.values()] == ["done", "stale", "stale", "stale", "stale", "stale"]
    assert states["r0-sft"].why == f"data changed: {root / 'moved.jsonl'}"
    with (root / "train.bin").open("r+b") as stream:  # no manifest is written anew: the block's sum tells
        stream.write(b"\x07")
    with pytest.raises(UserError, match=r"train\.bin: the 64 MiB block 0 does not have the manifest's SHA-256"):
        wheels.states(file)


def test_the_recipe_counts_by_content(copied: Copied) -> None:
    """Logging changes no model; a learning rate does, and so does the base."""
    root = copied()
    file, recipe = root / "wheel.toml", root / "mid.toml"
    recipe.write_text(recipe.read_text() + "\n[logging]\nevery_steps = 7\n")
    assert words(file) == dict.fromkeys(NAMES, "done")
    change(root, "mid", set={"optimizer.peak_lr": 2e-3})
    assert wheels.states(file)["r0-mid"].why == "changed: optimizer.peak_lr = 0.001 before, 0.002"
    assert words(file) == dict.fromkeys(NAMES, "stale")
    wheels.write_wheel(root, wheels.settings(root))
    wheels.make_base(root / "base", seed=1)
    assert wheels.states(file)["r0-mid"].why == "follows base"


def test_a_parent_that_was_replaced(copied: Copied) -> None:
    """A byte that changed is refused by name; nothing starts."""
    root = copied()
    file, nodes = root / "wheel.toml", wheels.nodes(root / "wheel.toml")
    shutil.rmtree(nodes["r1-remit-sft"].folder)
    weights = next((nodes["r1-remit-mid"].folder / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is not what stage mid-\w+ left: model.safetensors has changed"):
        run(file, "r1-remit-sft")
    assert not nodes["r1-remit-sft"].folder.exists()


def test_a_parent_that_was_made_again(copied: Copied) -> None:
    """With the same bytes its children stay done; with others they are stale, and what they were is moved aside."""
    root = copied()
    file, nodes = root / "wheel.toml", wheels.nodes(root / "wheel.toml")
    shutil.rmtree(nodes["r1-remit-sft"].folder)
    assert wheels.states(file)["r1-remit-rl"].why == "r1-remit-sft is stale" or words(file)["r1-remit-rl"] == "stale"
    run(file, "r1-remit-sft")
    assert words(file) == dict.fromkeys(NAMES, "done")
    known = read_manifest(nodes["r1-remit-rl"].folder)
    assert known is not None
    write_manifest(nodes["r1-remit-rl"].folder, known.model_copy(update={"parents": {"model": "0" * 16}}))
    assert wheels.states(file)["r1-remit-rl"].why == "r1-remit-sft is another model now"
    run(file)
    assert words(file) == dict.fromkeys(NAMES, "done")
    assert [path.name for path in (root / "wheel" / "old").iterdir()] == [f"{nodes['r1-remit-rl'].folder.name}.1"]


def test_two_wheels(copied: Copied) -> None:
    root = copied()
    file = root / "wheel.toml"
    other = root / "other.toml"
    shutil.copy(file, other)
    with pytest.raises(UserError, match=rf"is the wheel of {file}: name another folder in {other}"):
        run(other)
    with locked(root / "wheel" / ".lock"), pytest.raises(UserError, match="another process runs this wheel"):
        run(file)
    node = wheels.nodes(change(root, "rl", seed=5))["r0-rl"]
    with locked(lock_of(node)), pytest.raises(UserError, match="r0-rl: another process runs this stage"):
        run(file, "r0-rl")
    (root / "full").mkdir()
    (root / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty and holds no wheel"):
        run(wheels.write_wheel(root, wheels.settings(root) | {"wheel": str(root / "full")}))


@pytest.mark.parametrize(
    ("mistake", "error", "said"),
    [
        ("nan", UserError, "model.norm.weight holds values that are not finite"),
        ("rows", UserError, r"model.embed_tokens.weight is \[60, 32\], config.json asks for \[61, 32\]"),
        ("full", RunError, "No space left on device"),
    ],
)
def test_an_output_that_will_not_do(mistake: str, error: type[Exception], said: str, copied: Copied) -> None:
    """Is no model of the wheel's, and no stage is made from it."""
    root = copied()
    file = wheels.write_wheel(root, wheels.settings(root, mistake))
    with pytest.raises(error, match=said):
        run(file, "r0-rl")
    nodes = wheels.nodes(file)
    assert read_manifest(nodes["r0-sft"].folder) is None
    assert not (nodes["r0-sft"].folder / "model").exists()
    assert words(file)["r0-sft"] == "stopped"
    assert not nodes["r0-rl"].folder.exists()


def test_a_benchmark(copied: Copied) -> None:
    """Adds stages and reruns none; its figures are in the table and in the model's card."""
    root = copied()
    script = root / "count.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "model, output = sys.argv[sys.argv.index('--model') + 1], sys.argv[sys.argv.index('--output') + 1]\n"
        "size = pathlib.Path(model, 'config.json').stat().st_size\n"
        "pathlib.Path(output).write_text(json.dumps({'accuracy': size / 10000}))\n"
    )
    benchmark = {"after": ["base", "rl"], "command": ["python3", str(script)], "data": [str(script)]}
    file = change(root, "benchmarks", size=benchmark)
    todo = [name for name, word in words(file).items() if word != "done"]
    assert todo == ["base-size", "r0-rl-size", "r1-remit-rl-size"]
    run(file)
    table = wheels.remit(file, "status")
    assert "9 of 9 stages are done" in table
    assert "accuracy 0.0" in table
    card = (wheels.nodes(file)["r0-rl"].folder / "model" / "README.md").read_text()
    assert "| size: accuracy | 0.0" in card
    script.write_text(script.read_text() + "\n")
    assert words(file)["r0-rl-size"] == "stale"
    script.write_text("import sys\nsys.exit('remit: no such model')\n")
    with pytest.raises(RunError, match="base-size: no such model"):
        run(file)


def test_report(finished: Path, tmp_path: Path) -> None:
    """A page with a figure for every kind of stage that has numbers."""
    page = tmp_path / "page.html"
    said = wheels.remit(finished / "wheel.toml", "report", "--output", str(page))
    assert said.strip() == str(page)
    text = page.read_text()
    assert text.count("<figure>") == text.count("</svg>") == 4, "SFT loss, RL correct, mid-training NLL and gap"
    for name in NAMES:
        assert f"<td>{name}</td><td>done</td>" in text


def test_only_one_stage(copied: Copied) -> None:
    """By its name or its folder's; not from a parent that is to be made again, and not under a name that is no more."""
    root = copied()
    file, nodes = root / "wheel.toml", wheels.nodes(root / "wheel.toml")
    shutil.rmtree(nodes["r1-remit-sft"].folder)
    shutil.rmtree(nodes["r1-remit-rl"].folder)
    with pytest.raises(UserError, match="r1-remit-sft is not done: run it first"):
        run_only(file, load_wheel(file), "r1-remit-rl")
    run_only(file, load_wheel(file), nodes["r1-remit-sft"].folder.name)
    assert words(file)["r1-remit-sft"] == "done"
    change(root, "sft", seed=1)
    with pytest.raises(UserError, match=r"no such stage in .*; a changed setting or datum gives a stage another key"):
        run_only(file, load_wheel(file), nodes["r1-remit-sft"].folder.name)
