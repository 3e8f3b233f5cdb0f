"""TensorBoard and an offline Weights & Biases run hold what metrics.jsonl holds; a failing logger stops nothing."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.runs import settings, train_all

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a file header of its own.

    A block holds fragments [crc 4, length 2, type 1, data]; types are 1 whole, 2 first, 3 middle, 4 last.
    """
    at, parts = FILE_HEADER, b""
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_history(run: Path) -> dict[int, dict[str, Any]]:
    """Steps and their values from the run's own binary log."""
    from wandb.proto import wandb_internal_pb2

    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    history = {}
    for data in wandb_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history[int(items["step"])] = items
    return history


def tensorboard_scalars(run: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(name)}


def test_loggers_hold_the_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    recipe = settings(folder, "logged", logging={"tensorboard": True, "wandb": "offline"})
    assert run_ranks(1, train_all, [recipe]) == [[(0, "")]]
    run = folder / "logged"
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    history, losses = wandb_history(run), tensorboard_scalars(run, "loss")
    assert history.keys() == losses.keys() == lines.keys() == set(range(1, 13))
    for step, line in lines.items():
        assert losses[step] == pytest.approx(line["loss"], rel=1e-6)  # TensorBoard stores float32
        for key in ("tokens", "loss", "nll", "grad_norm", "lr"):
            assert history[step][key] == line[key]
    assert tensorboard_scalars(run, "eval/held/nll").keys() == {6, 12}
    (meta,) = run.glob("checkpoints/step-00000012/meta.json")
    (offline,) = run.glob("wandb/offline-run-*")
    assert offline.name.endswith(json.loads(meta.read_text())["loggers"]["wandb"]), "the id lives in the checkpoint"


def test_a_failing_logger_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own setting is invalid, so that its start fails."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_RETRY_MAX", "never")
    assert run_ranks(1, train_all, [settings(folder, "unlogged", logging={"wandb": "offline"})]) == [[(0, "")]]
    assert len((folder / "unlogged" / "metrics.jsonl").read_text().splitlines()) == 12
    assert not list((folder / "unlogged").glob("wandb/offline-run-*")), "wandb started: the test tests nothing"
