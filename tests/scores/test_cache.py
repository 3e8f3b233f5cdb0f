"""A cache of scores without a model: what fits it, and what others may do to it while a run reads."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.errors import RemitError, RunError, UserError
from remit_megatron.scores.cache import ScoreCache, blocks_of
from remit_megatron.scores.manifest import CacheManifest, SourceScores


def manifest_of(*samples: int, **other: object) -> CacheManifest:
    """Of sources d, e, ... with so many samples, blocks of 3 samples of 4 positions."""
    sources = tuple(SourceScores(fingerprint=name, samples=n) for name, n in zip("defg", samples, strict=False))
    common = {
        "reference": "r",
        "precision": "fp32",
        "tokenizer": "a",
        "sequence_length": 4,
        "data_seed": 1,
        "document_mask": False,
        "eod_mask_loss": False,
        "eod_id": None,
        "block_samples": 3,
        "sources": sources,
    }
    return CacheManifest.model_validate(common | other)


def fill(cache: ScoreCache) -> None:
    """Row r of a block from sample f on holds f + 4r, f + 4r + 1, f + 4r + 2 and f + 4r + 3 steps."""
    for block in blocks_of(cache.manifest):
        steps = np.arange(block.samples * 4, dtype=np.int32).reshape(-1, 4) + block.first
        cache.write_block(block, steps, np.ones_like(steps))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(4, 0)
    fill(cache := ScoreCache.begin(tmp_path, manifest, "--output"))
    with pytest.raises(UserError, match="the tokenizer was a when they were made, this recipe has b"):
        ScoreCache.open(tmp_path, manifest.model_copy(update={"tokenizer": "b"}))
    with pytest.raises(RunError, match="sample 3, position 1 of source 0 is not a number"):
        cache.write_block(blocks_of(manifest)[1], np.array([[1, -1, 2, 3]]), np.ones((1, 4)))
    with pytest.raises(UserError, match=r"holds scores of other datasets than data\.train, or of the same in another"):
        ScoreCache.begin(tmp_path, manifest.model_copy(update={"sources": manifest.sources[::-1]}), "--output")


def test_one_tokenizer_by_two_names(tmp_path: Path) -> None:
    """Scores made when a tokenizer was known by the hash of its file serve a recipe that knows what decides its ids."""
    before, now = "c" * 64, f"{'a' * 32}-{'b' * 16}-{'c' * 16}-{'d' * 12}"
    manifest = manifest_of(4, 0).model_copy(update={"tokenizer": before})
    fill(ScoreCache.begin(tmp_path, manifest, "--output"))
    wanted = manifest.model_copy(update={"tokenizer": now})
    assert ScoreCache.open(tmp_path, wanted).scores(0, 3).tolist() == [x / 2048 for x in (3, 4, 5, 6)]
    cache = ScoreCache.begin(tmp_path, wanted, "--output")  # goes on under the name that the blocks are bound to
    assert cache.manifest == manifest
    assert not cache.missing()
    for other in (f"{'e' * 32}-{'b' * 16}-{'e' * 16}-{'d' * 12}", None):
        with pytest.raises(UserError, match="the tokenizer was cccccccccccc when they were made, this recipe has"):
            ScoreCache.open(tmp_path, manifest.model_copy(update={"tokenizer": other}))


def test_sources_in_any_order_or_twice(tmp_path: Path) -> None:
    manifest = manifest_of(4, 0)
    fill(ScoreCache.begin(tmp_path, manifest, "--output"))
    swapped = manifest.model_copy(update={"sources": manifest.sources[::-1]})
    assert ScoreCache.open(tmp_path, swapped).scores(1, 3).tolist() == [x / 2048 for x in (3, 4, 5, 6)]
    twice = (SourceScores(fingerprint="d", samples=2), SourceScores(fingerprint="d", samples=4))
    fill(ScoreCache.begin(tmp_path / "twice", manifest.model_copy(update={"sources": twice}), "--output"))
    for first in (twice, twice[::-1]):  # one dataset named twice: the scores are the same
        named = ScoreCache.open(tmp_path / "twice", manifest.model_copy(update={"sources": first}))
        assert [named.scores(i, 1)[0] for i in (0, 1)] == [4 / 2048] * 2
    (tmp_path / "twice/source-001/00000000.scores").unlink()
    named = ScoreCache.open(tmp_path / "twice", manifest.model_copy(update={"sources": twice[:1]}))
    assert named.scores(0, 1)[0] == 4 / 2048, "the one that is done serves"


def test_growing_while_a_run_reads(tmp_path: Path) -> None:
    """A run needs what it was planned for, at its start and on the way, whatever others add meanwhile."""
    manifest = manifest_of(4, 0)
    fill(ScoreCache.begin(tmp_path, manifest, "--output"))
    early = ScoreCache.open(tmp_path, manifest)
    more = manifest_of(5, 7)
    grown = ScoreCache.begin(tmp_path, more, "--output")
    assert [grown.is_whole(block) for block in blocks_of(more)] == [True, False, False, False, False]
    assert [block.number for block in grown.missing()] == [1, 0, 1, 2], "a block with fewer samples is made again"
    late = ScoreCache.open(tmp_path, manifest)
    with pytest.raises(UserError, match=r"lacks 4 of 5 blocks, first 00000001\.scores of source 0"):
        ScoreCache.open(tmp_path, more)

    grown.write_block(blocks_of(more)[1], np.array([[3, 4, 5, 6], [7, 8, 9, 10]]), np.ones((2, 4)))
    for reading in (early, late, ScoreCache.open(tmp_path, manifest)):
        assert reading.scores(0, 3).tolist() == [x / 2048 for x in (3, 4, 5, 6)]
        assert reading.has(0, 3)
        assert reading.saturated_share() == 0
    fewer = ScoreCache.begin(tmp_path, manifest, "--output")
    assert fewer.manifest.sources == more.sources, "a writer that needs less keeps what others are to write"


def test_a_damaged_block_that_a_run_does_not_need(tmp_path: Path) -> None:
    fill(ScoreCache.begin(tmp_path, manifest_of(4, 7), "--output"))
    path = tmp_path / "source-001" / "00000000.scores"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert ScoreCache.open(tmp_path, manifest_of(4)).scores(0, 0).tolist() == [x / 2048 for x in (0, 1, 2, 3)]
    with pytest.raises(UserError, match=r"source-001/00000000.scores: its SHA-256 is not the one in its header"):
        ScoreCache.open(tmp_path, manifest_of(4, 7))


def test_blocks_of_other_scores_are_refused_and_made_again(tmp_path: Path) -> None:
    """Copied into one folder, as shards are: of another reference, of another dataset, of another number."""
    manifest = manifest_of(7, 7)
    fill(ScoreCache.begin(tmp_path / "good", manifest, "--output"))
    good = ScoreCache.open(tmp_path / "good", manifest)
    assert good.remark() is None
    dataset = manifest.model_copy(update={"sources": (SourceScores(fingerprint="x", samples=7),)})
    others = {"reference": manifest_of(7, 7, reference="other"), "dataset": dataset}
    for name, other in others.items():
        fill(ScoreCache.begin(tmp_path / name, other, "--output"))
        for number in range(3):
            mixed = tmp_path / f"{name} {number}"
            shutil.copytree(tmp_path / "good", mixed)
            shutil.copyfile(tmp_path / name / "source-000" / f"{number:08d}.scores", path_of(mixed, number))
            with pytest.raises(
                RunError, match=rf"0{number}\.scores: its scores are of another reference, precision or"
            ):
                ScoreCache.open(mixed, manifest)
            cache = ScoreCache.begin(mixed, manifest, "--output")
            assert [block.number for block in blocks_of(manifest) if not cache.is_whole(block)] == [number]
            fill(cache)
            assert path_of(mixed, number).read_bytes() == path_of(tmp_path / "good", number).read_bytes()


def test_no_bit_of_a_block_may_change(tmp_path: Path) -> None:
    """Statistics in the header, which decide whether a reference knows the data, are as safe as the scores."""
    manifest = manifest_of(3)
    fill(ScoreCache.begin(tmp_path, manifest, "--output"))
    path, (block,) = path_of(tmp_path, 0), blocks_of(manifest)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        cache = ScoreCache(tmp_path, manifest)
        assert not cache.is_whole(block), f"bit {bit % 8} of byte {bit // 8}"
        with pytest.raises((UserError, RunError), match=r"00000000\.scores"):
            ScoreCache.open(tmp_path, manifest)
    fill(cache)
    assert path.read_bytes() == whole


def path_of(folder: Path, number: int) -> Path:
    return folder / "source-000" / f"{number:08d}.scores"


def test_two_processes_do_not_write_one_shard(tmp_path: Path) -> None:
    one, other = (ScoreCache.begin(tmp_path, manifest_of(4, 0), "--output") for _ in range(2))
    with one.writing_shard(0, 2):
        with pytest.raises(RemitError, match="another process"), other.writing_shard(0, 2):
            raise AssertionError("two processes write one shard")
        with other.writing_shard(1, 2):
            pass
