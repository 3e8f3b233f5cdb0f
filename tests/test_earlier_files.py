"""Files of earlier versions, in tests/earlier, are read to the bit, and what is written today has the same bytes.

Whole runs begun by an earlier revision and finished by this one: tests/golden.py.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.config import dump_toml, load_recipe
from remit_megatron.run.checkpoint import CheckpointFolder, read_meta, write_meta
from remit_megatron.run.folder import RunFolder
from remit_megatron.scores.block import HEADER_BYTES
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest, SourceScores
from remit_megatron.scores.queue import QueueManifest, RunSide, ScorerSide, write_step
from remit_megatron.train.metrics import MetricsFile

LENGTH, SAMPLES = 8, 5
EARLIER_HEADER_BYTES = 76
"""Of a block of scores in the first format."""
MANIFEST = CacheManifest(
    reference="a" * 32,
    precision="fp32",
    tokenizer=None,
    sequence_length=LENGTH,
    data_seed=1234,
    document_mask=False,
    eod_mask_loss=False,
    eod_id=None,
    block_samples=3,
    sources=(SourceScores(fingerprint="f" * 64, samples=SAMPLES),),
)
QUEUE = QueueManifest(scores=MANIFEST, weights=(1.0,), step_samples=2, train_steps=3)
QUANTA = (np.arange(SAMPLES * LENGTH) * 97 % 4001).reshape(SAMPLES, LENGTH)
"""In the cache."""
STEP_2 = np.arange(2 * LENGTH, dtype=np.float32).reshape(2, LENGTH) / 7
"""In the queue: the scores of step 2, of samples 2 and 3."""


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    shutil.copytree(Path(__file__).parent / "earlier", tmp_path / "earlier")
    return tmp_path / "earlier"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_score_cache(earlier: Path, tmp_path: Path) -> None:
    folder = earlier / "scores"
    before = content(folder)
    assert len(before) == 3
    cache = ScoreCache.open(folder, MANIFEST)
    for number in range(SAMPLES):
        assert cache.quanta(0, number).tolist() == QUANTA[number].tolist()
        assert cache.scores(0, number).tolist() == (QUANTA[number] / 2048).tolist()
    assert "2 blocks of scores are of an earlier format" in str(cache.remark())
    again = ScoreCache.begin(tmp_path / "again", MANIFEST, "x")
    for cache in (ScoreCache.begin(folder, MANIFEST, "x"), again):
        for block in blocks_of(MANIFEST):
            quanta = QUANTA[block.first : block.first + block.samples].astype(np.int32)
            cache.write_block(block, quanta, np.ones_like(quanta))
        assert cache.remark() is None
        written = content(cache.folder)
        assert written.keys() == before.keys()
        # A block says what it belongs to, which it did not: its header is another one, its scores are the same bytes.
        for name, was in before.items():
            old, new = (EARLIER_HEADER_BYTES, HEADER_BYTES) if name.endswith(".scores") else (0, 0)
            assert written[name][new:] == was[old:], name
    assert content(again.folder) == content(folder)


def test_score_queue(earlier: Path, tmp_path: Path) -> None:
    folder = earlier / "queue"
    look = RunSide(folder, QUEUE, timeout_s=60.0).look(2, [(0, 2), (0, 3)])
    assert look.scores is not None, look.reason
    assert look.scores.tolist() == STEP_2.tolist()
    # The run that left these files needs step 2, which is there: a scorer goes on with the one after it.
    assert ScorerSide(folder, QUEUE, ahead_steps=2).next() == (3, False)
    write_step(tmp_path, 2, QUEUE, [(0, 2), (0, 3)], STEP_2)
    assert (tmp_path / "step-00000002.scores").read_bytes() == (folder / "step-00000002.scores").read_bytes()


def test_run_folder(earlier: Path) -> None:
    folder = earlier / "run"
    before = content(folder)
    recipe = load_recipe(folder / "recipe.toml")
    assert recipe.fingerprint() == "3e3d27b75e59"
    # Written again it says the same, and the defaults of keys that came later.
    assert set(before["recipe.toml"].decode().splitlines()) <= set(dump_toml(recipe).splitlines())
    RunFolder(folder, recipe).check()
    latest = CheckpointFolder(folder / "checkpoints", keep=2).latest()
    assert latest == folder / "checkpoints" / "step-00000001"
    meta = read_meta(latest)
    assert (meta.step, meta.tokens, meta.recipe) == (1, 16, recipe.fingerprint())
    assert meta.model_shape().hidden_size == 16
    assert meta.loggers == {"wandb": "0123abcd"}
    write_meta(latest, meta)
    MetricsFile(folder / "metrics.jsonl", resumed_step=2).close()
    assert content(folder) == before
    MetricsFile(folder / "metrics.jsonl", meta.step).close()
    assert (folder / "metrics.jsonl").read_bytes() == before["metrics.jsonl"].splitlines(keepends=True)[0]
