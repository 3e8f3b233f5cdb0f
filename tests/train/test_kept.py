"""Checkpoints that a run keeps to be benchmarked, beside those that take turns."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.config import load_recipe, parse_recipe
from remit_megatron.data import checksums
from remit_megatron.errors import UserError
from remit_megatron.plan import plan
from remit_megatron.run.checkpoint import BYTES_PER_PARAMETER, CheckpointFolder, Meta, read_meta
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, settings, train_all

STEP = SEQUENCE * SAMPLES
"""Tokens."""


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def train_and_go_on(rank: int, recipe: dict[str, Any]) -> list[Any]:
    """A run, then the same run from what a kill after step 6 had left; what is on disk after each."""
    run = Path(recipe["run"])
    first = train_all(rank, [recipe]), steps(run), metrics(run.parent, run.name)
    for step in (8, 9, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    (run / "DONE").unlink()
    return [*first, train_all(rank, [recipe]), steps(run), metrics(run.parent, run.name)]


def test_kept_beside_the_newest(folder: Path) -> None:
    """Every fourth step's stays, through a resume that does them again; of the others the newest one does."""
    saved = {"every_steps": 3, "keep": 2, "keep_every_tokens": 4 * STEP - 1}
    recipe = settings(folder, "kept", checkpoint=saved, evaluation={"every_steps": 0})
    ((code, at_end, straight, again, at_end_again, resumed),) = run_ranks(1, train_and_go_on, recipe)
    assert code == again == [(0, "")]
    # 511 tokens and their multiples are first reached by steps 4, 8, 12; 3 and 6 had gone, 9 is the second newest.
    assert at_end == [4, 6, 8, 9, 12]
    assert at_end_again == [4, 6, 8, 9, 12]
    assert resumed == straight
    checkpoints = CheckpointFolder(folder / "kept" / "checkpoints", keep=2)
    assert [read_meta(path).step for path in checkpoints.kept()] == [4, 8, 12]
    assert checkpoints.latest() == checkpoints.folder / "step-00000012"
    for path in checkpoints.kept():
        assert checksums.problems(path, checksums.read(path), content=True) == []


def save(folder: CheckpointFolder, step: int, *, stays: bool = False) -> Path:
    partial = folder.begin(step)
    (partial / "__0_0.distcp").write_bytes(bytes(100))
    checksums.write(partial, checksums.of_files([partial / "__0_0.distcp"]))
    return folder.commit(Meta(shape={}, step=step), stays=stays)


def test_rotation(tmp_path: Path) -> None:
    """A kept one is not counted, not even as the newest; marked by hand it stays, saved again too; unmarked it goes."""
    folder = CheckpointFolder(tmp_path, keep=1)
    one, two, three = save(folder, 1), save(folder, 2, stays=True), save(folder, 3)
    assert [path.exists() for path in (one, two, three)] == [False, True, True]
    four = save(folder, 4, stays=True)
    assert three.exists(), "the newest of those that take turns"
    (three / "KEEP").touch()
    save(folder, 3)
    five = save(folder, 5)
    assert folder.kept() == [two, three, four]
    (two / "KEEP").unlink()
    save(folder, 6)
    assert [path.exists() for path in (two, three, four, five)] == [False, True, True, False]


def test_what_a_recipe_keeps(folder: Path) -> None:
    def recipe(every: int, **changes: Any) -> Any:
        return parse_recipe(settings(folder, "run", checkpoint={"keep_every_tokens": every}, **changes))

    kept = [n for n in range(1, 13) if recipe(3 * STEP + 5).keeps_checkpoint(n * STEP)]
    assert kept == [4, 7, 10]
    assert recipe(3 * STEP + 5).kept_checkpoints == 3
    assert [n for n in range(1, 13) if recipe(STEP).keeps_checkpoint(n * STEP)] == list(range(1, 13))
    assert recipe(0).kept_checkpoints == 0
    assert recipe(0).fingerprint() == recipe(STEP).fingerprint(), "a run may begin or cease to keep some"
    with pytest.raises(UserError, match=rf"keep_every_tokens = {STEP - 1} is less than a step's .* = {STEP}: every"):
        recipe(STEP - 1)


def test_bytes_in_the_plan() -> None:
    """50B tokens in steps of 2M, every 5B kept: ten, beside the newest two."""
    path = Path(__file__).parents[2] / "launch" / "recipes" / "olmo2_1b_remit.toml"
    text = plan(load_recipe(path, ["checkpoint.keep_every_tokens=5_000_000_000", "checkpoint.keep=2"]), 8)
    one = 1_484_916_736 * BYTES_PER_PARAMETER / 1e9
    assert f"{one:.2f} GB a checkpoint; the newest 2 stay, and 10 more (checkpoint.keep_every_tokens): " in text
    assert f": {12 * one:,.1f} GB" in text
