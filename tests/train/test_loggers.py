"""TensorBoard and an offline Weights & Biases run hold what metrics.jsonl holds; a failing logger stops nothing."""

import json
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remit_megatron import cli
from remit_megatron.train import wandb_run
from tests.ranks import run_ranks
from tests.train.runs import SEQUENCE, settings, train_all

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
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return history_of(log)


def history_of(log: Path) -> dict[int, dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    history: dict[int, dict[str, Any]] = {}
    for data in wandb_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            assert int(items["step"]) == record.history.step.num, "wandb's own step is the run's"
            assert record.history.step.num > max(history, default=0), "unique and rising"
            history[int(items["step"])] = items
    return history


def tensorboard_scalars(run: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(name)}


def tensorboard_histograms(run: Path, name: str) -> dict[int, float]:
    """Number of values at each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})  # by default only the last
    events.Reload()
    return {e.step: e.histogram_value.num for e in events.Histograms(name)}


def test_loggers_hold_the_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    recipe = settings(folder, "logged", logging={"tensorboard": True, "wandb": "offline", "tokens_every_steps": 6})
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
    for step in (6, 12):  # of ntp: 4 samples, each token's weight 1
        counts = lines[step]["token_weights"]["counts"]
        assert counts[20] == sum(counts) == 4 * SEQUENCE
        assert history[step]["token_weights/_type"] == "histogram"
        assert history[step]["token_weights/values"] == counts
    assert tensorboard_histograms(run, "token_weights") == {6: 4 * SEQUENCE, 12: 4 * SEQUENCE}
    (meta,) = run.glob("checkpoints/step-00000012/meta.json")
    (offline,) = run.glob("wandb/offline-run-*")
    assert offline.name.endswith(json.loads(meta.read_text())["loggers"]["wandb"]), "the id lives in the checkpoint"


def test_a_restart_goes_on_in_the_same_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each offline start has a folder of its own, of one id; `remit sync-wandb` makes one of all."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = settings(folder, "relogged", logging={"wandb": "offline"})
    assert run_ranks(1, train_all, [recipe]) == [[(0, "")]]
    run = folder / "relogged"
    (first,) = run.glob("wandb/offline-run-*/run-*.wandb")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    assert run_ranks(1, train_all, [recipe]) == [[(0, "")]]
    (second,) = set(run.glob("wandb/offline-run-*/run-*.wandb")) - {first}
    assert second.name == first.name, "the id is in the name"
    assert history_of(first).keys() == set(range(1, 13))
    assert history_of(second).keys() == set(range(7, 13))

    assert cli.main(["sync-wandb", str(run), "--offline"]) == 0
    (whole,) = set(run.glob("wandb/offline-run-*/run-*.wandb")) - {first, second}
    assert whole.name == first.name
    assert str(whole.parent) in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, items in history_of(whole).items():
        assert {key: items[key] for key in lines[step - 1]} == lines[step - 1]
    assert history_of(whole).keys() == set(range(1, 13))
    assert cli.main(["sync-wandb", str(folder)]) == 2

    # An id that is given needs no checkpoint, not even a readable one.
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / "latest").mkdir(parents=True)
    assert cli.main(["sync-wandb", str(run), "--offline"]) == 2
    assert cli.main(["sync-wandb", str(run), "--offline", "--id", "given"]) == 0
    assert list(run.glob("wandb/offline-run-*/run-given.wandb"))


def test_without_a_network_it_is_kept_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("no_proxy", "*")
    assert run_ranks(1, train_all, [settings(folder, "alone", logging={"wandb": "online"})]) == [[(0, "")]]
    assert wandb_history(folder / "alone").keys() == set(range(1, 13))


def test_a_service_that_never_answers_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing: wandb waits for it, training's end does not."""
    monkeypatch.setattr(wandb_run, "CLOSE_S", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 1.0}\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        target = wandb_run.Target(run=str(tmp_path), identity="abcd1234", project="remit", mode="online", last_step=1)
        process = wandb_run.WandbProcess(target)
        assert process._process is not None
        server.settimeout(60)
        with server.accept()[0]:  # its own question whether there is a network
            begun = time.monotonic()
            process.close()
            assert time.monotonic() - begun < 30
    assert process._process.poll() == -signal.SIGKILL


def test_a_failing_logger_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own setting is invalid, so that its start fails."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_RETRY_MAX", "never")
    assert run_ranks(1, train_all, [settings(folder, "unlogged", logging={"wandb": "offline"})]) == [[(0, "")]]
    assert len((folder / "unlogged" / "metrics.jsonl").read_text().splitlines()) == 12
    assert not list((folder / "unlogged").glob("wandb/offline-run-*")), "wandb started: the test tests nothing"
