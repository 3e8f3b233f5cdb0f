"""Reference scores on disk, in blocks with checksums, keyed by source and number of the sample: 2 bytes a token, more
where K tokens of its distribution are kept too.

PATH/manifest.json              what the scores belong to, and how many samples of each source are scored
PATH/source-000/00000012.scores one block (scores/block.py): what it belongs to, a checksum, a row for each sample

A block's file is complete or absent, and its bytes follow from the manifest and its number alone. So scoring resumes
after any kill, shards work in one folder or are merged by copying their files together, and the result is the same.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from remit_megatron.data.files import locked, make_folder, write_atomically, writing
from remit_megatron.errors import RunError, UserError
from remit_megatron.ops.score_quanta import LARGEST, QUANTA_PER_NAT
from remit_megatron.scores.block import REMEDY, Block, BlockHeader, check_header, pack, read_header, verified
from remit_megatron.scores.manifest import CacheManifest, SourceScores, check_same
from remit_megatron.scores.record import pack_rows, stored_row

BLOCK_BYTES = 4 << 20
VERIFY_BYTES = 256 << 20
"""A cache is read whole at start up to this size; a larger one block by block, before a block's first use."""
MAX_SATURATED_SHARE = 1e-3


def blocks_of(manifest: CacheManifest) -> list[Block]:
    """All blocks in order of source and number."""
    return [
        _block(manifest, source, number)
        for source, one in enumerate(manifest.sources)
        for number in range(-(-one.samples // manifest.block_samples))
    ]


def _block(manifest: CacheManifest, source: int, number: int) -> Block:
    first = number * manifest.block_samples
    return Block(source, number, first, min(manifest.block_samples, manifest.sources[source].samples - first))


def with_block_samples(manifest: CacheManifest) -> CacheManifest:
    """With so many samples a block that it has BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // stored_row(manifest).itemsize)
    return manifest.model_copy(update={"block_samples": size})


class ScoreCache:
    """A folder of scores. Reading is safe from any thread; one process a shard writes."""

    def __init__(self, folder: Path, manifest: CacheManifest, key: str = "reference.scores"):
        self.folder = folder
        self.manifest = manifest
        self.key = key
        """Recipe key or flag that named the folder, for messages."""
        self._sources = list(range(len(manifest.sources)))
        """The cache's number of each of the run's sources."""
        self._maps: dict[tuple[int, int], np.ndarray] = {}
        self._seen: set[tuple[int, int]] = set()
        """Blocks whose file is known to be there; none of them goes again."""

    # Writing.

    @staticmethod
    def begin(folder: Path, manifest: CacheManifest, key: str) -> "ScoreCache":
        """Open for writing: make the folder, or go on with it. Raises UserError where it holds other scores."""
        make_folder(folder, key)
        with locked(folder / ".lock"):
            if (folder / "manifest.json").exists():
                found = CacheManifest.read(folder, key)
                check_same(found, manifest, folder, key)
                merged = tuple(
                    a if a.samples >= b.samples else b for a, b in zip(found.sources, manifest.sources, strict=True)
                )
                manifest = found.model_copy(update={"sources": merged})
                if manifest == found:
                    return ScoreCache(folder, manifest, key)
            manifest.write(folder)
        return ScoreCache(folder, manifest, key)

    @contextmanager
    def writing_shard(self, shard: int, shards: int) -> Iterator[None]:
        """Raises UserError where another process writes the same shard."""
        path = self.folder / f".shard-{shard}-of-{shards}.lock"
        with locked(path, busy=f"{self.folder}: another process scores this shard: wait for it or stop it"):
            yield

    def write_block(self, block: Block, quanta: np.ndarray, mask: np.ndarray, planes: np.ndarray | None = None) -> None:
        """quanta [samples, s] of int32 in [0, 65535]; mask [samples, s], nonzero where a token is scored; planes
        [P, samples, s] of the distribution, where it is kept, as `record.to_planes` makes them.

        Raises RunError for a score that is not a number, and where the disk refuses.
        """
        if (quanta < 0).any():
            sample, position = np.argwhere(quanta < 0)[0].tolist()
            raise RunError(
                f"the reference's score of sample {block.first + sample}, position {position} of source {block.source} "
                "is not a number: its weights or its precision are broken"
            )
        assert (planes is None) == (self.manifest.distribution is None), "the manifest says what is kept"
        path = self._path(block.source, block.number)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        rows = pack_rows(stored_row(self.manifest), quanta, planes)
        write_atomically(path, pack(block, rows, quanta, mask, self.manifest.belongs_to(block.source)))

    def is_whole(self, block: Block) -> bool:
        """Whether a block is there and undamaged."""
        try:
            self._verified(block)
        except (UserError, RunError):
            return False
        return True

    # Reading.

    @staticmethod
    def open(
        folder: Path, wanted: CacheManifest, key: str = "reference.scores", *, verify: bool = True
    ) -> "ScoreCache":
        """Open for a run whose scores would have the manifest `wanted`.

        Its sources may be some of the cache's, in any order, and others may go on with the cache meanwhile: what counts
        is what this run needs; labels' scores alone are read beside distributions too. Raises UserError naming what
        differs and, with `verify`, a block that is missing or damaged, or saturation.
        """
        found = CacheManifest.read(folder, key)
        if wanted.distribution is None:
            wanted = wanted.model_copy(update={"distribution": found.distribution})
        check_same(found, wanted, folder, key, sources=False)
        cache = ScoreCache(folder, found, key)
        cache._sources = [cache._source_of(i, one) for i, one in enumerate(wanted.sources)]
        needed = [0] * len(found.sources)
        for source, one in zip(cache._sources, wanted.sources, strict=True):
            needed[source] = max(needed[source], one.samples)
        sources = [one.model_copy(update={"samples": n}) for one, n in zip(found.sources, needed, strict=True)]
        cache.manifest = found.model_copy(update={"sources": tuple(sources)})
        if verify:
            cache._check_blocks()
        return cache

    def scores(self, source: int, number: int) -> np.ndarray:
        """Reference NLL [s] float32, nats, of one sample of the run's source. Raises RunError for a damaged block."""
        return self.quanta(source, number).astype(np.float32) / np.float32(QUANTA_PER_NAT)

    def quanta(self, source: int, number: int) -> np.ndarray:
        """The same as it is stored, [s] uint16."""
        row: np.ndarray = self.row(source, number)
        return row if self.manifest.distribution is None else row["nll"]

    def row(self, source: int, number: int) -> np.ndarray:
        """All that is kept of one sample, as `record.stored_row` says. Raises RunError for a damaged block."""
        index, row = divmod(number, self.manifest.block_samples)
        place = self._sources[source], index
        if place not in self._maps:
            block = _block(self.manifest, *place)
            self._maps[place] = self._verified(block)
        return self._maps[place][row]

    def has(self, source: int, number: int) -> bool:
        """Whether the block of a sample of the run's source is there."""
        place = self._sources[source], number // self.manifest.block_samples
        if place not in self._seen and self._is_there(_block(self.manifest, *place)):
            self._seen.add(place)
        return place in self._seen

    def saturated_share(self) -> float:
        """Share of scored tokens at the largest score, over the blocks that are there."""
        headers = self._headers()
        return sum(h.saturated for h in headers) / max(1, sum(h.tokens for h in headers))

    def remark(self) -> str | None:
        """What to say of blocks that name no manifest; None where all do."""
        unbound = sum(header.belongs_to is None for header in self._headers())
        return (
            f"{self.folder}: {unbound} blocks of scores are of an earlier format, which does not say what they belong "
            "to: they are used, and compared with the reference by reference.check_samples alone"
            if unbound
            else None
        )

    def check_saturation(self) -> None:
        """Raises UserError where more than MAX_SATURATED_SHARE of the tokens are saturated, RunError where damage to a
        block makes it look so."""
        share = self.saturated_share()
        if share > MAX_SATURATED_SHARE:
            for block in blocks_of(self.manifest):
                if self._is_there(block):
                    self._verified(block)
            raise UserError(
                f"{self.key}: {self.folder} has {share:.2%} of its tokens at the largest score that it can hold ("
                f"{LARGEST / QUANTA_PER_NAT:.2f} nats): such a reference does not know these data; score online instead"
            )

    def missing(self) -> list[Block]:
        """Blocks whose file is not there."""
        return [block for block in blocks_of(self.manifest) if not self._is_there(block)]

    def _is_there(self, block: Block) -> bool:
        """Whether a block has its file, damaged or not. One with fewer samples is of a time when no more were needed:
        it is made again."""
        try:
            with self._path(block.source, block.number).open("rb") as stream:
                header = read_header(stream)
        except FileNotFoundError:
            return False
        except (OSError, struct.error):
            return True
        return (header.source, header.first) != (block.source, block.first) or header.samples >= block.samples

    def _source_of(self, i: int, wanted: SourceScores) -> int:
        fingerprints = [one.fingerprint for one in self.manifest.sources]
        if wanted.fingerprint not in fingerprints:
            known = ", ".join(one[:12] for one in fingerprints)
            raise UserError(
                f"{self.key}: {self.folder} has no scores of the dataset of data.train[{i}] "
                f"({wanted.fingerprint[:12]}; it has {known}): run `remit score` with this recipe"
            )
        # A recipe may name one dataset twice; its scores are the same, but one of the two may not be done yet.
        same = [source for source, one in enumerate(fingerprints) if one == wanted.fingerprint]
        source = max(same, key=lambda source: self.manifest.sources[source].samples)
        if len(same) > 1:
            source = next((one for one in same if self._is_done(one, wanted.samples)), source)
        samples = self.manifest.sources[source].samples
        if samples < wanted.samples:
            raise UserError(
                f"{self.key}: {self.folder} has scores of {samples:,} samples of data.train[{i}], the run needs "
                f"{wanted.samples:,}: run `remit score` with this recipe, it adds the rest"
            )
        return source

    def _is_done(self, source: int, samples: int) -> bool:
        """Whether so many samples of one of the cache's sources are there."""
        size = self.manifest.block_samples
        firsts = range(0, samples, size)
        blocks = (Block(source, first // size, first, min(size, samples - first)) for first in firsts)
        return all(self._is_there(block) for block in blocks)

    def _check_blocks(self) -> None:
        missing = self.missing()
        if missing:
            raise UserError(
                f"{self.key}: {self.folder} lacks {len(missing)} of {len(blocks_of(self.manifest))} blocks, first "
                f"{self._path(missing[0].source, missing[0].number).name} of source {missing[0].source}: a shard is "
                "missing or was not finished; run `remit score` again, it adds what is missing"
            )
        self.check_saturation()
        blocks = blocks_of(self.manifest)
        if sum(b.samples for b in blocks) * stored_row(self.manifest).itemsize <= VERIFY_BYTES:
            try:
                for block in blocks:
                    self._verified(block)
            except RunError as error:
                raise UserError(str(error)) from None

    def _path(self, source: int, number: int) -> Path:
        return self.folder / f"source-{source:03d}" / f"{number:08d}.scores"

    @contextmanager
    def _opened(self, block: Block) -> Iterator[tuple[BlockHeader, BinaryIO]]:
        """A block's header and file, which may have more samples: others go on with it while this process reads."""
        path = self._path(block.source, block.number)
        try:
            with path.open("rb") as stream:
                header = read_header(stream)
                length, belongs_to = self.manifest.sequence_length, self.manifest.belongs_to(block.source)
                check_header(path, header, block, length, belongs_to)
                yield header, stream
        except (OSError, struct.error) as error:
            raise RunError(f"{path}: cannot be read: {error}; {REMEDY}") from None

    def _headers(self) -> list[BlockHeader]:
        return [self._header(block) for block in blocks_of(self.manifest) if self._is_there(block)]

    def _header(self, block: Block) -> BlockHeader:
        with self._opened(block) as (header, _):
            return header

    def _verified(self, block: Block) -> np.ndarray:
        """A block's rows [samples], mapped, after a look at every byte."""
        with self._opened(block) as (header, stream):
            return verified(self._path(block.source, block.number), stream, header, stored_row(self.manifest))
