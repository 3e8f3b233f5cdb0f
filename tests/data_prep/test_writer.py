"""The writer against Megatron-Core's builder, and its refusals."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import writer
from data_prep.work import claimed
from data_prep.writer import BlockHasher, DatasetWriter, write_dataset
from remit_megatron.data.manifest import Manifest, quick_verify
from remit_megatron.errors import UserError
from tests.data_prep.conftest import megatron_files, our_files


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 128256])
def test_bytes_equal_megatron(tmp_path: Path, vocab_size: int) -> None:
    """65499 and 65500 are the sides of the border between uint16 and int32."""
    generator = np.random.default_rng(vocab_size)
    documents = [generator.integers(0, vocab_size, size) for size in generator.integers(1, 400, 700)]
    write_dataset(tmp_path / "ours", documents, vocab_size=vocab_size, eod_id=vocab_size - 1)
    ended = [np.append(ids, vocab_size - 1) for ids in documents]
    assert our_files(tmp_path / "ours") == megatron_files(tmp_path / "theirs", ended, vocab_size)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any), chunk=st.integers(1, 7))
def test_any_lengths_and_chunking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], chunk: int
) -> None:
    """The index is written in chunks; where they fall must not matter. Empty documents are left out."""
    documents = [np.arange(1, length + 1) for length in lengths]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "CHUNK", chunk)
        patch.setattr(writer, "BATCH_DOCUMENTS", chunk)
        manifest = write_dataset(tmp_path / "ours", documents, vocab_size=20, eod_id=None, append_eod=False)
    kept = [ids for ids in documents if len(ids)]
    assert our_files(tmp_path / "ours") == megatron_files(tmp_path / "theirs", kept, 20)
    assert (manifest.num_documents, manifest.num_tokens) == (len(kept), sum(lengths))
    assert manifest.largest_id == max(lengths)


@pytest.mark.parametrize("ids", [[1, 2, 100], np.array([5, -1]), np.array([1 << 40]), [70000]])
def test_ids_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    """numpy's cast would store 70000 as 4464 in uint16."""
    write_dataset(tmp_path / "a", [[1]], vocab_size=100, append_eod=False)
    before = our_files(tmp_path / "a")
    with pytest.raises(UserError, match="outside the vocabulary of 100"):
        write_dataset(tmp_path / "a", [[3], ids], vocab_size=100, append_eod=False)
    assert our_files(tmp_path / "a") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.manifest.json"]


def test_refusals(tmp_path: Path) -> None:
    cases = [
        (dict(documents=[], vocab_size=9, append_eod=False), "no token"),
        (dict(documents=[[]], vocab_size=9, append_eod=False), "no token"),
        (dict(documents=[[1]], vocab_size=9), "needs eod_id"),
        (dict(documents=[[1]], vocab_size=9, eod_id=9), "outside the vocabulary"),
        (dict(documents=[[1, 2]], vocab_size=9, eod_id=1, append_eod=False), "does not end with the EOD"),
        (dict(documents=[[1.5]], vocab_size=9, append_eod=False), "list of integers"),
        (dict(documents=[[1]], vocab_size=1 << 40, append_eod=False), "vocab_size"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            write_dataset(tmp_path / "a", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--output: .*file cannot be written to: .*file is no folder: name another one"
    ):
        write_dataset(tmp_path / "file" / "a", [[1]], vocab_size=9, append_eod=False)


def test_manifest_of_written(tmp_path: Path) -> None:
    manifest = write_dataset(
        tmp_path / "a", [[1, 2], [3]], vocab_size=9, eod_id=0, tokenizer_hash="ab", provenance={"command": "test"}
    )
    assert Manifest.read(tmp_path / "a") == manifest
    info = quick_verify(str(tmp_path / "a"), vocab_size=4, tokenizer_hash="ab")
    assert (info.num_tokens, info.num_documents, info.largest_id, info.eod_id, info.warnings) == (5, 2, 3, 0, ())


def test_block_hashes_do_not_depend_on_pieces() -> None:
    content = np.random.default_rng(0).bytes(1000)
    whole, pieces = BlockHasher(64), BlockHasher(64)
    whole.update(memoryview(content))
    for start in range(0, 1000, 37):
        pieces.update(memoryview(content)[start : start + 37])
    assert whole.digests() == pieces.digests()
    assert len(whole.digests()) == 16


def test_writer_appends_arrays(tmp_path: Path) -> None:
    with claimed(str(tmp_path / "a")) as work:
        ours = DatasetWriter(tmp_path / "a", work, vocab_size=70000)
        ours.append(np.array([1, 2, 3], dtype=np.uint32), np.array([1, 2]))
        ours.append(np.array([69999], dtype=np.uint32), np.array([1]))
        ours.commit()
    expected = [np.array([1]), np.array([2, 3]), np.array([69999])]
    assert our_files(tmp_path / "a") == megatron_files(tmp_path / "b", expected, 70000)
