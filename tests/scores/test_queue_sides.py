"""The two sides of a queue of scores, without models: what each does when the other is gone, late, or another's."""

from pathlib import Path

import numpy as np
import pytest

from remit_megatron.data.files import locked
from remit_megatron.errors import UserError
from remit_megatron.scores.manifest import SourceScores
from remit_megatron.scores.queue import (
    HEADER,
    RUN_LOCK,
    Look,
    QueueManifest,
    RunSide,
    ScorerSide,
    read_step,
    write_step,
)
from tests.scores.manifests import score_manifest


@pytest.fixture
def manifest() -> QueueManifest:
    return QueueManifest(scores=score_manifest(40), weights=(1.0,), step_samples=2, train_steps=20)


class Pair:
    """Both sides of a queue, and a clock that the test moves."""

    def __init__(self, folder: Path, manifest: QueueManifest):
        self.folder, self.manifest, self.now = folder, manifest, 1000.0
        self.run = RunSide(folder, manifest, 5.0, lambda: self.now)

    def scorer(self, manifest: QueueManifest | None = None) -> ScorerSide:
        return ScorerSide(self.folder, manifest or self.manifest, 3)

    def samples(self, step: int) -> list[tuple[int, int]]:
        return [(0, 2 * step), (0, 2 * step + 1)]

    def score(self, scorer: ScorerSide) -> int | None:
        step, _ = scorer.next()
        if step is not None:
            scores = np.full((2, 4), step, dtype=np.float32)
            write_step(self.folder, step, scorer.manifest, self.samples(step), scores)
            scorer.announce(step)
        return step

    def look(self, step: int) -> Look:
        return self.run.look(step, self.samples(step))

    @property
    def files(self) -> list[int]:
        return sorted(int(path.stem[5:]) for path in self.folder.glob("step-*.scores"))


@pytest.fixture
def pair(tmp_path: Path, manifest: QueueManifest) -> Pair:
    return Pair(tmp_path / "queue", manifest)


def test_one_tokenizer_by_two_names(pair: Pair) -> None:
    """The scorer's datasets name the tokenizer as a file that another program saved again does."""
    names = [f"{'a' * 32}-{'b' * 16}-{digit * 16}-{'d' * 12}" for digit in "01"] + [f"{'e' * 32}-{'b' * 16}-0-d"]
    ours, theirs, other = (
        pair.manifest.model_copy(update={"scores": pair.manifest.scores.model_copy(update={"tokenizer": name})})
        for name in names
    )
    pair.run = RunSide(pair.folder, ours, 5.0, lambda: pair.now)
    pair.run.publish(1)
    scorer = pair.scorer(theirs)
    assert pair.score(scorer) == 1
    scores = pair.look(1).scores
    assert scores is not None
    assert scores.tolist() == [[1.0] * 4] * 2
    assert "the tokenizer" in str(ours.difference(other))
    fewer = theirs.scores.model_copy(update={"sources": (SourceScores(fingerprint="e", samples=40),)})
    assert ours.difference(theirs.model_copy(update={"scores": fewer})) == "the datasets of data.train"


def test_a_scorer_stays_in_its_window(pair: Pair) -> None:
    """It waits for a run, is never more than three steps ahead, removes what was used, and ends with the run."""
    scorer = pair.scorer()
    assert scorer.next() == (None, False)
    pair.run.publish(1)
    assert [pair.score(scorer) for _ in range(4)] == [1, 2, 3, None]
    scores = pair.look(1).scores
    assert scores is not None
    assert (scores == 1).all()
    pair.run.publish(2)
    assert [pair.score(scorer) for _ in range(2)] == [4, None]
    assert pair.files == [2, 3, 4]
    pair.run.publish(19)  # the last window holds two steps only
    assert [pair.score(scorer) for _ in range(3)] == [19, 20, None]
    pair.run.publish(21, done=True)
    assert scorer.next() == (None, True)
    assert pair.files == []


def test_a_run_that_had_ended_before_is_not_followed(pair: Pair, manifest: QueueManifest) -> None:
    """A folder may serve one run after the other, with other scores even; the next start has another name."""
    other = manifest.model_copy(update={"train_steps": 5})
    for ended in (manifest, other):
        RunSide(pair.folder, ended, timeout_s=1.0).publish(21, done=True)
        scorer = pair.scorer()
        assert scorer.next() == (None, False)
    pair.run.publish(3)
    assert pair.score(scorer) == 3
    pair.run.publish(21, done=True)
    assert scorer.next() == (None, True)


def test_a_run_that_starts_again_earlier(pair: Pair) -> None:
    scorer = pair.scorer()
    pair.run.publish(10)
    assert [pair.score(scorer) for _ in range(3)] == [10, 11, 12]
    pair.run = RunSide(pair.folder, pair.manifest, 5.0, lambda: pair.now)
    pair.run.publish(9)
    assert [pair.score(scorer) for _ in range(2)] == [9, None]
    assert pair.files == [9, 10, 11], "what is beyond the window goes"
    assert pair.look(9).scores is not None
    assert pair.look(10).scores is not None


def test_a_scorer_that_stands_still_and_comes_back(pair: Pair) -> None:
    """By the reader's clock alone; what is ready stays in use whatever has become of its scorer."""
    assert pair.look(1).reason == "no scorer has come yet"
    pair.run.publish(1)
    scorer = pair.scorer()
    pair.score(scorer)
    assert pair.look(2).wait
    pair.now += 5
    assert pair.look(2).wait
    pair.now += 0.5
    assert pair.look(2) == Look(reason="the scorer has not moved for 6 s")
    assert pair.look(1).scores is not None
    scorer.beat(at_once=True)
    assert pair.look(2).wait
    pair.score(scorer)
    assert pair.look(2).scores is not None
    scorer.beat(ended=True)
    assert pair.look(3).reason == "the scorer has ended"
    pair.score(pair.scorer())
    assert pair.look(3).scores is not None


def test_a_new_scorer_goes_on_with_what_is_whole(pair: Pair, manifest: QueueManifest) -> None:
    pair.run.publish(1)
    scorer = pair.scorer()
    for _ in range(3):
        pair.score(scorer)
    path = pair.folder / "step-00000002.scores"
    path.write_bytes(path.read_bytes()[:-3])
    half = pair.folder / ".step-00000004.scores.77.tmp"
    half.write_bytes(b"half")
    again = pair.scorer()
    assert not half.exists()
    assert pair.files == [1, 3]
    assert [pair.score(again) for _ in range(2)] == [2, None]
    # Scores of another reference are not even looked at.
    other = manifest.model_copy(update={"scores": manifest.scores.model_copy(update={"reference": "s"})})
    assert read_step(pair.folder, 1, other) is None
    with locked(pair.folder / RUN_LOCK):  # as a run that lives holds it
        refusing = pair.scorer(other)
    with pytest.raises(
        UserError, match=r"needs other scores than this recipe's: the reference's weights \(r there, s here\)"
    ):
        refusing.next()
    waiting = pair.scorer(other)
    assert waiting.next() == (None, False), "what a killed run has left is nothing to follow, and nothing to refuse"
    pair.run.publish(1)
    waiting.beat(at_once=True)
    assert "makes other scores: the reference's weights" in str(pair.look(1).reason)


def test_a_damaged_file_is_done_without(pair: Pair) -> None:
    pair.run.publish(1)
    scorer = pair.scorer()
    pair.score(scorer)
    path = pair.folder / "step-00000001.scores"
    content = bytearray(path.read_bytes())
    content[HEADER.size + 40] ^= 1
    path.write_bytes(content)
    assert pair.look(1).wait, "it may just be being replaced"
    pair.now += 1.5
    assert "was damaged or removed" in str(pair.look(1).reason)
    pair.score(scorer)
    with pytest.raises(UserError, match="scores of other samples than this run's step 2"):
        pair.run.look(2, pair.samples(3))
    (pair.folder / "scorer.json").write_text('{"manifest": ')  # lost while it was replaced: the last word counts
    assert pair.look(2).scores is not None
