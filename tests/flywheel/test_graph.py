"""Which stages a file gives, which of them arms share, and which mistakes are refused; nothing runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import load_wheel
from tests.flywheel import wheels

NO_EVAL = {"recipe": "mid.toml", "set": {"data.eval": {}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("graph")
    wheels.make_files(root)
    return root


def plan(root: Path, **content: Any) -> dict[str, Any]:
    return wheels.nodes(wheels.write_wheel(root, wheels.settings(root) | content))


def test_arms_share_what_is_equal(root: Path) -> None:
    """The arm ntp is round 0 again, whatever the round; guided arms differ in mid-training and what follows."""
    arms = {"ntp": {"objective": {"name": "ntp"}}, "remit": {}, "kd": {"objective": {"name": "kd"}, "rounds": 1}}
    nodes = plan(root, arms=arms, rounds=2)
    assert nodes["r2-ntp-rl"] is nodes["r1-ntp-rl"] is nodes["r0-rl"]
    folders = {nodes[name].folder for name in ("r0-mid", "r1-remit-mid", "r2-remit-mid", "r1-kd-mid")}
    assert len(folders) == 4
    assert "r2-kd-mid" not in nodes
    assert nodes["r2-remit-mid"].parents["reference"].node is nodes["r1-remit-rl"]
    assert nodes["r2-remit-mid"].parents["model"].name == "base"
    assert nodes["r1-kd-sft"].parts["settings"] == nodes["r0-sft"].parts["settings"]


def test_what_guides(root: Path) -> None:
    """The SFT model, or what RL kept at half of its steps."""
    nodes = plan(root, arms={"sft": {"reference": "sft"}, "early": {"reference": "rl@0.5"}})
    assert nodes["r1-sft-mid"].parents["reference"].path == nodes["r0-sft"].folder / "model"
    early = nodes["r1-early-mid"].parents["reference"]
    assert early.path == nodes["r0-rl"].folder / "keep" / "050"
    assert early.name == "r0-rl@0.5"


def test_start(root: Path) -> None:
    """Rounds start from the base, or from the arm's mid-trained model before."""
    base = plan(root, rounds=2)
    again = plan(root, rounds=2, start="previous")
    assert again["r1-remit-rl"].key == base["r1-remit-rl"].key
    assert again["r2-remit-mid"].key != base["r2-remit-mid"].key
    assert again["r2-remit-mid"].parents["model"].node is again["r1-remit-mid"]


def test_given_models(root: Path) -> None:
    """Take the place of round 0; what is in their folder counts, not its place."""
    wheels.make_base(root / "tuned", seed=3)
    nodes = plan(root, given={"rl": str(root / "tuned")})
    assert list(nodes) == ["r1-remit-mid", "r1-remit-sft", "r1-remit-rl"]
    (root / "tuned").rename(root / "elsewhere")
    assert plan(root, given={"rl": str(root / "elsewhere")})["r1-remit-rl"].key == nodes["r1-remit-rl"].key
    wheels.make_base(root / "elsewhere", seed=4)
    assert plan(root, given={"rl": str(root / "elsewhere")})["r1-remit-rl"].key != nodes["r1-remit-rl"].key
    other = root / "elsewhere" / "tokenizer.json"
    content = json.loads(other.read_text())
    one, two = sorted(content["model"]["vocab"])[-2:]
    ids = content["model"]["vocab"]
    ids[one], ids[two] = ids[two], ids[one]
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"given.rl: .*elsewhere does not do as a reference for the base: tokenizer"):
        plan(root, given={"rl": str(root / "elsewhere")})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"arm": {}}, "unknown key arm, did you mean arms?"),
        ({"arms": {"remit": {"referense": "rl"}}}, "unknown key arms.remit.referense, did you mean reference?"),
        ({"arms": {"a": {"reference": "rl@0.1"}}}, "arms.a is guided by rl@0.1: put 0.1 into rl.keep"),
        ({"arms": {"a": {"reference": "dpo"}}}, r"arms.a is guided by dpo, and there is no stage \[dpo\]"),
        ({"arms": {"a-b": {}}}, "arms.a-b: letters, digits and _ make a name"),
        ({"arms": {"a": {"objective": {"name": "ntp"}, "reference": "rl"}}}, "objective other than ntp"),
        ({"arms": {"a": {"objective": {"name": "remitt"}}}}, "unknown objective.name 'remitt', did you mean remit?"),
        ({"given": {"sft": "x"}}, r"arms.remit is guided by rl, which is not in \[given\]"),
        ({"base": "nowhere"}, "base: .*nowhere is no Hugging Face folder"),
        ({"sft": {"data": ["nowhere"], "max_tokens": 4, "peak_lr": 1e-3, "batch_samples": 1}}, "sft.data: nowhere"),
        ({"sft": {"data": ["x"], "max_tokens": 4, "peak_lr": 1e-3, "batch_samples": 0}}, "sft.batch_samples: "),
        ({"benchmarks": {"b": {"after": ["rl"]}}}, "benchmarks.b: give suite or command"),
        ({"benchmarks": {"b": {"after": ["mid"], "kl_to": "rl"}}}, "benchmarks.b.kl_to = 'rl': one of r0-mid, r0-sft"),
        (
            {"benchmarks": {"b": {"after": ["mid"], "kl_to": "r0-rl"}}, "mid": NO_EVAL},
            "name a held-out set in data.eval",
        ),
    ],
)
def test_mistakes(content: dict[str, Any], said: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    file = wheels.write_wheel(root, wheels.settings(root) | content)
    with pytest.raises(UserError, match=said):
        wheels.planned(file)


def test_overrides(root: Path) -> None:
    file = wheels.write_wheel(root, wheels.settings(root))
    assert load_wheel(file, ["rounds=3", "rl.steps=7"]).stages["rl"].model_dump()["steps"] == 7
