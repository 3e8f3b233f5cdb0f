"""What a run folder holds says what it belongs to, and a start asks: files of other runs and steps are refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.writer import write_dataset
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.data import checksums
from remit_megatron.data.manifest import Manifest
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.run.checkpoint import CheckpointFolder, Meta, read_meta, write_meta
from remit_megatron.run.folder import RunFolder, settings_digest
from tests.ranks import run_ranks
from tests.train.runs import EOD, VOCAB, make_data, metrics, settings, train_all

OLDER, NEWEST = "step-00000006", "step-00000012"


def checkpoints(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints"


def meta_of_another_step(folder: Path, name: str) -> None:
    shutil.copyfile(
        checkpoints(folder, "sound") / OLDER / "meta.json", checkpoints(folder, name) / NEWEST / "meta.json"
    )


def files_of_another_step(folder: Path, name: str) -> None:
    """All but meta.json."""
    there = checkpoints(folder, name) / NEWEST
    shutil.copyfile(there / "meta.json", folder / "kept.json")
    shutil.rmtree(there)
    shutil.copytree(checkpoints(folder, "sound") / OLDER, there)
    os.replace(folder / "kept.json", there / "meta.json")


def checkpoints_of_another_recipe(folder: Path, name: str) -> None:
    shutil.rmtree(checkpoints(folder, name))
    shutil.copytree(checkpoints(folder, "other"), checkpoints(folder, name))


def of_an_earlier_version(folder: Path, name: str) -> None:
    """Its meta.json says neither settings nor held-out sets nor manifest."""
    for path in checkpoints(folder, name).glob("step-*"):
        meta = json.loads((path / "meta.json").read_text())
        for key in ("settings", "held_out", "manifest", "checksum"):
            meta.pop(key)
        meta["checksum"] = checksums.own_checksum(meta)
        (path / "meta.json").write_text(json.dumps(meta))


def of_an_earlier_version_and_another_recipe(folder: Path, name: str) -> None:
    checkpoints_of_another_recipe(folder, name)
    of_an_earlier_version(folder, name)


def to_step_6(folder: Path, name: str) -> None:
    shutil.rmtree(checkpoints(folder, name) / NEWEST)
    (checkpoints(folder, name) / "latest").write_text(f"{OLDER}\n")


def cut_metrics(folder: Path, name: str) -> None:
    to_step_6(folder, name)
    path = folder / name / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))


def of_tokenizer(folder: Path, name: str, known: str) -> None:
    """Back at step 6, of a version that knew the tokenizer by `known`."""
    to_step_6(folder, name)
    path = checkpoints(folder, name) / OLDER / "meta.json"
    meta = json.loads(path.read_text()) | {"tokenizer": known}
    meta.pop("checksum")
    path.write_text(json.dumps(meta | {"checksum": checksums.own_checksum(meta)}))


TOKENIZER, TOKENIZER_BEFORE = f"{'a' * 32}-{'b' * 16}-{'c' * 16}-{'d' * 12}", "c" * 64
REFUSED: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "meta of another step": (meta_of_another_step, "its meta.json is of step 6: the files of two checkpoints"),
    "files of another step": (files_of_another_step, "its meta.json belongs to another manifest.json"),
    "another recipe": (checkpoints_of_another_recipe, "was trained with another recipe than this run's recipe.toml"),
    "another tokenizer": (
        lambda folder, name: of_tokenizer(folder, name, "e" * 64),
        "was trained with another tokenizer than that of data.train",
    ),
    "another recipe, earlier": (of_an_earlier_version_and_another_recipe, "was trained with another recipe"),
}


def train_on(rank: int, folder: Path) -> dict[str, tuple[int, str]]:
    """On one rank: a run and one of another recipe, then starts on changed copies of the first."""
    made = [settings(folder, "sound"), settings(folder, "other", optimizer={"peak_lr": 1e-2})]
    assert train_all(rank, made) == [(0, "")] * 2
    changes: dict[str, Any] = {name: change for name, (change, _) in REFUSED.items()}
    changes |= {"earlier": of_an_earlier_version, "held out": to_step_6, "free keys": to_step_6, "cut": cut_metrics}
    changes["tokenizer"] = lambda folder, name: of_tokenizer(folder, name, TOKENIZER_BEFORE)
    recipes = {name: settings(folder, name) for name in changes}
    for name, change in changes.items():
        shutil.copytree(folder / "sound", folder / name)
        change(folder, name)
    to_step_6(folder, "earlier")
    manifest = Manifest.read(folder / "train")
    assert manifest is not None
    manifest.model_copy(update={"tokenizer_hash": TOKENIZER}).write(folder / "named")
    for suffix in (".bin", ".idx"):
        (folder / f"named{suffix}").symlink_to(folder / f"train{suffix}")
    for name in ("tokenizer", "another tokenizer"):
        recipes[name]["data"]["train"] = [{"path": str(folder / "named")}]
    generator = [[1 + (i * j) % 60 for j in range(40)] for i in range(1, 12)]
    write_dataset(str(folder / "other held"), generator, vocab_size=VOCAB, eod_id=EOD)
    recipes["held out"]["data"]["eval"]["held"] = str(folder / "other held")
    recipes["held out"]["evaluation"]["every_steps"] = 3
    # The same data under another name, and what the device's default means, written out.
    for suffix in (".bin", ".idx", ".manifest.json"):
        (folder / f"elsewhere{suffix}").symlink_to(folder / f"train{suffix}")
    recipes["free keys"]["data"]["train"] = [{"path": str(folder / "elsewhere")}]
    recipes["free keys"]["optimizer"]["max_bad_steps"] = 9
    recipes["free keys"]["compute"]["precision"] = "fp32"
    outcomes = dict(zip(recipes, train_all(rank, list(recipes.values())), strict=True))
    return {**outcomes, "moved": train_moved(rank, settings(folder, "moved"))}


def train_moved(rank: int, recipe: dict[str, Any]) -> tuple[int, str]:
    """After its first checkpoint the run folder gets another name."""
    from remit_megatron.train.saver import Saver

    save = Saver._save

    def save_and_move(self: Saver, wait: bool) -> None:
        save(self, wait)
        os.rename(recipe["run"], recipe["run"] + " away")

    Saver._save = save_and_move  # type: ignore[method-assign]
    try:
        return train_all(rank, [recipe])[0]
    finally:
        Saver._save = save  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and no runs of other tests."""
    folder = tmp_path_factory.mktemp("bound")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Any:
    return run_ranks(1, train_on, folder)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_another_run_or_step_are_refused(folder: Path, outcomes: Any, name: str) -> None:
    code, message = outcomes[name]
    assert code == 2, message
    assert REFUSED[name][1] in message
    assert f"{folder / name}/checkpoints/step-" in message
    assert metrics(folder, name) == metrics(folder, "sound")


def test_a_run_of_before_goes_on_and_is_bound(folder: Path, outcomes: Any) -> None:
    assert outcomes["earlier"] == (0, "")
    assert metrics(folder, "earlier") == metrics(folder, "sound")
    log = (folder / "earlier" / "log.txt").read_text()
    assert f"checkpoint {OLDER} is of a version that did not say which settings and held-out sets" in log
    bound, sound = (read_meta(checkpoints(folder, name) / NEWEST) for name in ("earlier", "sound"))
    assert bound.manifest is not None
    assert replace(bound, manifest=None) == replace(sound, manifest=None)


def test_a_held_out_set_that_was_replaced_is_marked(folder: Path, outcomes: Any) -> None:
    assert outcomes["held out"] == (0, "")
    assert "warning: data.eval.held is another set" in (folder / "held out" / "log.txt").read_text()
    marked = [line["step"] for line in metrics(folder, "held out") if "eval/held/replaced" in line]
    assert marked == [9], "the first figure after it"
    assert not any("eval/held/replaced" in line for line in metrics(folder, "sound"))


def test_settings_that_move_no_number_may_change(folder: Path, outcomes: Any) -> None:
    assert outcomes["free keys"] == (0, "")
    assert metrics(folder, "free keys") == metrics(folder, "sound")


def test_a_folder_that_was_moved_is_noticed(folder: Path, outcomes: Any) -> None:
    """At the next save; what was saved before is whole in its new place, and the old one has no second half of it."""
    code, message = outcomes["moved"]
    assert code == 1
    assert "was moved or removed while it was trained: nothing more is written" in message
    assert not (folder / "moved" / "checkpoints").exists()
    there = CheckpointFolder(folder / "moved away" / "checkpoints", keep=1).latest()
    assert there is not None
    assert there.name == OLDER
    assert checksums.whole(there)
    assert not (folder / "moved away" / "DONE").exists()


def test_a_tokenizer_may_be_known_by_a_name_of_before(folder: Path, outcomes: Any) -> None:
    assert outcomes["tokenizer"] == (0, "")
    assert metrics(folder, "tokenizer") == metrics(folder, "sound")


def test_missing_lines_are_said(folder: Path, outcomes: Any) -> None:
    assert outcomes["cut"] == (0, "")
    assert "warning: metrics.jsonl has no line of step 5 to 6" in (folder / "cut" / "log.txt").read_text()
    sound = metrics(folder, "sound")
    assert metrics(folder, "cut") == sound[:4] + sound[6:]


def test_a_replaced_checkpoint_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any rename of a save that replaces the newest one: a start finds it or its successor."""
    real = os.rename
    for kill_at in (1, 2, 3):
        folder = CheckpointFolder(tmp_path / str(kill_at), keep=2)
        old, new = (Meta(shape={"x": 1}, step=5, tokens=tokens) for tokens in (1, 2))
        save(folder, old)
        calls = 0

        def rename(*names: Any, kill_at: int = kill_at) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise KeyboardInterrupt
            real(*names)

        monkeypatch.setattr(os, "rename", rename)
        if kill_at < 3:
            with pytest.raises(KeyboardInterrupt):
                save(folder, new)
        else:
            save(folder, new)
        monkeypatch.setattr(os, "rename", real)
        folder.recover()
        found = folder.latest()
        assert found is not None
        assert json.loads((found / "meta.json").read_text())["tokens"] == (2 if kill_at == 3 else 1)
        assert checksums.whole(found)
        save(folder, replace(new, step=6))
        assert [path.name for path in sorted(folder.folder.iterdir())] == ["latest", "step-00000005", "step-00000006"]


def save(folder: CheckpointFolder, meta: Meta) -> None:
    partial = folder.begin(meta.step)
    (partial / "__0_0.distcp").write_bytes(bytes(100))
    checksums.write(partial, checksums.of_files([partial / "__0_0.distcp"]))
    folder.commit(meta)


@pytest.mark.parametrize(("scope", "free"), [("microbatch", False), ("global", True)])
def test_a_microbatch_that_decides_what_is_trained_stays(tmp_path: Path, scope: str, free: bool) -> None:
    """Rho-1 chooses tokens among those of a microbatch, or of the whole step."""
    objective = {"objective": {"name": "rho1", "scope": scope}, "reference": {"path": "r"}}
    one, other = (parse_recipe(settings(tmp_path, "run", batch={"microbatch_samples": n}, **objective)) for n in (2, 4))
    assert (settings_digest(one) == settings_digest(other)) == free
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run", one)
    folder.write_recipe(dump_toml(one))
    folder.check()
    if free:
        RunFolder(tmp_path / "run", other).check()
    else:
        with pytest.raises(UserError, match=r"batch.microbatch_samples = 2 there, 4 here"):
            RunFolder(tmp_path / "run", other).check()


def test_meta_is_bound_to_its_manifest(tmp_path: Path) -> None:
    from tests.mcore.harness import STUDENT

    checksums.write(tmp_path, {})
    write_meta(tmp_path, Meta(shape=STUDENT.model_dump(), step=3))
    assert read_meta(tmp_path).step == 3
    (tmp_path / "file").write_bytes(b"x")
    checksums.write(tmp_path, checksums.of_files([tmp_path / "file"]))
    with pytest.raises(DamagedError, match=r"belongs to another manifest\.json"):
        read_meta(tmp_path)
    os.rename(tmp_path / "manifest.json", tmp_path / "away")
    with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
        read_meta(tmp_path)
