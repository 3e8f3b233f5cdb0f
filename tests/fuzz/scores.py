"""Scores on disk: folders of `remit score`, and queues between a scorer and a run."""

import json
from pathlib import Path

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.queue import QueueManifest, RunSide, ScorerSide, read_step, write_step
from tests.fuzz.framework import Target, register
from tests.scores.manifests import score_manifest

MANIFEST = score_manifest(4, 3)
QUEUE = QueueManifest(scores=MANIFEST, weights=(1.0, 1.0), step_samples=2, train_steps=20)
STEPS = (3, 4, 5)


def prepare(folder: Path) -> None:
    cache = ScoreCache.begin(folder / "scores", MANIFEST, "--output")
    for block in blocks_of(MANIFEST):
        quanta = np.arange(block.samples * 4, dtype=np.int32).reshape(-1, 4) + block.first
        cache.write_block(block, quanta, np.ones_like(quanta))


def read() -> None:
    cache = ScoreCache.open(Path("scores"), MANIFEST)
    found = [cache.scores(source, n) for source, one in enumerate(MANIFEST.sources) for n in range(one.samples)]
    np.save("found.npy", np.stack(found))


def same(folder: Path, valid: Path) -> str | None:
    """Every byte is under a checksum, so that what is read is what was written."""
    numbers = [first + row for first, rows in ((0, 3), (3, 1), (0, 3)) for row in [4 * r for r in range(rows)]]
    wanted = np.array([[n, n + 1, n + 2, n + 3] for n in numbers], dtype=np.float32) / 2048
    return None if np.array_equal(np.load(folder / "found.npy"), wanted) else "other scores than were written"


def samples(step: int) -> list[tuple[int, int]]:
    return [(0, step % 4), (1, step % 3)]


def prepare_queue(folder: Path) -> None:
    queue = folder / "queue"
    scorer = ScorerSide(queue, QUEUE, 3)
    RunSide(queue, QUEUE, 5.0).publish(STEPS[0])
    for step in STEPS:
        write_step(queue, step, QUEUE, samples(step), np.full((2, 4), step, dtype=np.float32))
        scorer.announce(step)


def run_looks() -> None:
    """A run: the scores of each step that it finds, or why it does without."""
    side = RunSide(Path("queue"), QUEUE, 5.0)
    looks = {step: side.look(step, samples(step)) for step in STEPS}
    found = {step: None if look.scores is None else look.scores.tolist() for step, look in looks.items()}
    if any(look.scores is None and not look.wait and not look.reason for look in looks.values()):
        raise AssertionError("neither scores nor a reason")
    Path("found.json").write_text(json.dumps(found))


def looked(folder: Path, valid: Path) -> str | None:
    found = json.loads((folder / "found.json").read_bytes())
    wrong = [step for step, scores in found.items() if scores not in (None, [[float(step)] * 4] * 2)]
    return f"other scores of step {wrong[0]}" if wrong else None


def scorer_looks() -> None:
    """A scorer that comes: what it takes over, and which step it makes next."""
    side = ScorerSide(Path("queue"), QUEUE, 3)
    step, done = side.next()
    if step is not None and not 1 <= step <= QUEUE.train_steps:
        raise UserError(f"wants to score step {step}")
    Path("found.json").write_text(json.dumps([step, done]))


def taken_over(folder: Path, valid: Path) -> str | None:
    """Whatever is left in the folder is whole."""
    for path in (folder / "queue").glob("step-*.scores"):
        found = read_step(valid / "queue", int(path.stem.removeprefix("step-")), QUEUE)
        if found is None or (valid / "queue" / path.name).read_bytes() != path.read_bytes():
            return f"kept a changed {path.name}"
    return None


FILES = ("queue/*.json", "queue/step-*.scores")
register(Target("scores", prepare, ("scores/manifest.json", "scores/*/*"), read, same, also=(1,), share=2))
register(Target("queue.run", prepare_queue, FILES, run_looks, looked, also=(1,), share=1.5))
register(Target("queue.scorer", prepare_queue, FILES, scorer_looks, taken_over, own=True, also=(1,), share=1.5))
