"""Results of `remit benchmark` on kept checkpoints, joined to what their runs had trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.analysis.runs import write_runs
from remit_megatron.benchmark import results
from remit_megatron.benchmark.model import find_model
from remit_megatron.benchmark.suite import SUITES
from remit_megatron.cli import main
from remit_megatron.errors import UserError
from remit_megatron.hf.mapping import read_shape
from remit_megatron.run.checkpoint import CheckpointFolder, Meta
from tests.analysis.test_runs import write_run

BASE = SUITES["base"]
AVERAGE = "benchmark/base/average"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16,
}


def make_run(root: Path, name: str, kept: dict[int, float], **more: Any) -> Path:
    """A run with a kept checkpoint at some steps, and results of each, below root/bench/name, with its share of right
    answers in every benchmark of the suite `base`."""
    run = write_run(root / name, {20: 2.0}, **more)
    like = root / "like"
    like.mkdir(exist_ok=True)
    (like / "config.json").write_text(json.dumps(CONFIG))
    (like / "tokenizer.json").write_text("{}")
    shape = read_shape(CONFIG, "config").model_dump()
    checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
    for step, share in kept.items():
        partial = checkpoints.begin(step)
        (partial / "__0_0.distcp").write_bytes(f"{name} {step}".encode())
        path = checkpoints.commit(Meta(shape=shape, step=step, tokens=1000 * step), stays=True)
        write_results(root / "bench" / name / path.name, path, like, share)
    return run


def write_results(folder: Path, checkpoint: Path, like: Path, share: float, **settings: Any) -> None:
    """As `remit benchmark` leaves them, by its own functions, but for lm_eval's figures."""
    found = find_model(str(checkpoint), str(like), chat=False)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {
        b.name: {
            "task": b.task,
            "state": results.DONE,
            "metrics": {key: {"value": share if i == 0 else 0.0} for i, key in enumerate(b.metrics)},
        }
        for b in BASE.benchmarks
    }
    model = {"source": str(checkpoint), "identity": found.identity, "checkpoint": found.standing}
    content = {"format": 1, "model": model, "settings": {"suite": "base", "limit": None, **settings}, "tasks": tasks}
    results.write(folder, content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ntp reaches 30% at 20,000 tokens, remit at 10,000, in steps of a quarter more time."""
    make_run(tmp_path, "ntp", {5: 0.1, 10: 0.2, 20: 0.3})
    make_run(tmp_path, "remit", {5: 0.25, 10: 0.31, 20: 0.4}, step_ms=125.0)
    return tmp_path


def test_accuracy_over_tokens(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, names = root / "out", ("ntp", "remit")
    runs, bench = ([str(folder / name) for name in names] for folder in (root, root / "bench"))
    command = ["analyze", "runs", *runs, "--metric", AVERAGE, "--results", *bench, "--output", str(out)]
    assert main(command) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    ours = next(row for row in rows if row and row[0] == "remit")
    assert ours[1:5] == ["20,000", "40.0000", "10,000", "2.00x"]
    table = [row for row in rows if len(row) == 3 + len(BASE.benchmarks)]
    assert table[0] == ["run", "tokens", "average", *(b.name for b in BASE.benchmarks)]
    assert [row[:4] for row in table[2:]] == [
        [name, f"{tokens},000", f"{figure:.2f}", f"{figure:.2f}"]
        for name, figures in (("ntp", (10, 20, 30)), ("remit", (25, 31, 40)))
        for tokens, figure in zip((5, 10, 20), figures, strict=True)
    ]
    points = json.loads((out / "trajectories.json").read_text())
    assert [(p["run"], p["tokens"], p["figures"]["GSM8K"]) for p in points[3:5]] == [
        ("remit", 5000, 25.0),
        ("remit", 10000, 31.0),
    ]
    assert (out / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "runs.json").read_text())
    assert (content["better"], content["target"]) == ("higher", 30.0)
    base, faster = (one["reached_device_hours"] for one in content["runs"])
    assert faster / base == pytest.approx((9000 + 9 * 125) / (9000 + 19 * 100))


def compare(root: Path, *folders: Path, metric: str = AVERAGE) -> str:
    return write_runs([root / "ntp", root / "remit"], metric, root / "out", results=list(folders))


def test_runs_that_were_moved_and_checkpoints_that_are_gone(root: Path) -> None:
    """Content tells whose results they are; where a checkpoint is gone, the run's folder does."""
    for path in (root / "remit" / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (root / "ntp").rename(root / "elsewhere")
    text = write_runs([root / "elsewhere", root / "remit"], AVERAGE, root / "out", results=[root / "bench"])
    assert "| elsewhere | 5,000 | 10.00 |" in text
    assert "| remit | 10,000 | 31.00 |" in text


def test_results_of_another_run(root: Path) -> None:
    """Are left out, and said so: of a run that is not compared, and of one trained again in its folder."""
    make_run(root, "third", {5: 0.9})
    again = root / "ntp" / "checkpoints" / "step-00000010" / "__0_0.distcp"
    again.write_bytes(b"ntp 1O")
    text = compare(root, root / "bench")
    for name in ("third/step-00000005", "ntp/step-00000010"):
        assert f"Left out, of none of these runs: {root}/bench/{name} (" in text
    assert "90.00" not in text
    assert "| ntp | 10,000 |" not in text


def test_mistakes(root: Path) -> None:
    bench, ntp = root / "bench", root / "ntp" / "checkpoints" / "step-00000005"
    with pytest.raises(UserError, match=r"no step has 'benchmark/base/GSM'; .*benchmark/base/ARC-C, "):
        compare(root, bench, metric="benchmark/base/GSM")
    (root / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"--results .*/empty: no results\.json of `remit benchmark` lies there or below"
    ):
        compare(root, bench, root / "empty")
    write_results(bench / "twice", ntp, root / "like", 0.5)
    with pytest.raises(UserError, match=r"ntp/step-00000005 and .*/twice are of one checkpoint: leave one out"):
        compare(root, bench)
    write_results(bench / "twice", ntp, root / "like", 0.5, limit=20)
    with pytest.raises(UserError, match=r"has limit = null, and .*/twice 20: figures of one curve"):
        compare(root, bench)
    shutil.rmtree(bench / "twice")
    metrics = root / "remit" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens": 10000', '"tokens": 10001'))
    with pytest.raises(UserError, match=r"is of step 10 at 10,000 tokens, and the metrics\.jsonl of remit has no such"):
        compare(root, bench)
    assert not (root / "out").exists()


def test_a_task_without_a_figure(root: Path) -> None:
    """Makes no average, and the others' curves are drawn."""
    path = root / "bench" / "remit" / "step-00000010" / "results.json"
    content = json.loads(path.read_text())
    content["tasks"]["GSM8K"] = {"task": "gsm8k", "state": "failed", "reason": "no data"}
    results.write(path.parent, content)
    assert "| remit | 10,000 | - | - | 31.00 |" in compare(root, root / "bench")
