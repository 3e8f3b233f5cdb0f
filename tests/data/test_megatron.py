"""Megatron-Core reads our datasets, and our packed samples are its own; damaged or stale indices heal."""

import logging
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from data_prep.inspect import verify
from data_prep.writer import write_dataset
from remit_megatron.config import Data
from remit_megatron.data.index_cache import ensure_cache
from remit_megatron.data.indexed import open_index
from remit_megatron.data.manifest import quick_verify
from remit_megatron.data.packed import open_packed
from remit_megatron.errors import RunError, UserError
from remit_megatron.mcore.datasets import open_source
from tests.data.conftest import VOCAB, random_documents

logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)


def gpt_dataset(prefix: str, length: int, cache: Path, seed: int = 5) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=length,
        path_to_cache=str(cache),
        split="1",
        tokenizer=SimpleNamespace(eod=0, vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)


def test_indexed_dataset_reads_it(dataset: str) -> None:
    theirs, ours = IndexedDataset(dataset), open_index(dataset)
    assert len(theirs) == 400
    for number, ids in enumerate(random_documents(0)):
        assert theirs[number].tolist() == [*ids, 0] == ours.document(number).tolist()
    assert theirs.document_indices.tolist() == list(range(401))


@pytest.mark.parametrize("vocab_size", [VOCAB, 100_000])
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_samples_are_those_of_gpt_dataset(vocab_size: int, length: int, tmp_path: Path) -> None:
    """Samples inside a document and over many, in both dtypes."""
    prefix = str(tmp_path / "data")
    write_dataset(prefix, random_documents(2, vocab=vocab_size), vocab_size=vocab_size, eod_id=0)
    theirs = gpt_dataset(prefix, length, tmp_path / "cache")
    ours = open_packed(open_index(prefix), tmp_path / "cache")
    assert len(ours) == len(theirs) > 10
    for index in range(min(len(ours), 600)):
        sample = theirs[index]
        text = ours.text(index)
        assert text.dtype == np.int64
        assert text[:-1].tolist() == sample["tokens"].tolist()
        assert text[1:].tolist() == sample["labels"].tolist()


def test_packed_needs_one_index(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"0 files \*-document_index.npy"):
        open_packed(open_index(dataset), tmp_path)
    for length in (5, 6):
        gpt_dataset(dataset, length, tmp_path / "cache")
    with pytest.raises(RunError, match="2 files"):
        open_packed(open_index(dataset), tmp_path / "cache")


def test_an_index_that_finds_no_room_names_the_remedy(dataset: str, tmp_path: Path) -> None:
    """As on a full disk, but possible without rights: the system refuses to let a file grow."""
    settings = {"sequence_length": 32, "train": [{"path": dataset}], "cache_dir": str(tmp_path / "cache")}
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            open_source(dataset, Data.model_validate(settings), VOCAB)
        except UserError as error:
            os._exit(0 if "cannot be written" in str(error) and "set data.cache_dir" in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not any(path.suffix == ".tmp" for path in tmp_path.rglob("*"))


def test_index_follows_the_data(dataset: str, tmp_path: Path) -> None:
    """Data made again under one name gets another index; a cut index is built again, where Megatron fails for ever."""

    def samples() -> list[list[int]]:
        key = {"fingerprint": quick_verify(dataset).fingerprint, "length": 32}
        cache = ensure_cache(tmp_path / "cache", key, lambda folder: gpt_dataset(dataset, 32, folder) and None)
        packed = open_packed(open_index(dataset), cache)
        return [packed.text(n).tolist() for n in range(len(packed))]

    first = samples()
    for path in (tmp_path / "cache").glob("*/*sample_index.npy"):
        path.write_bytes(path.read_bytes()[:-16])
    assert samples() == first
    write_dataset(dataset, random_documents(3, count=100), vocab_size=VOCAB, eod_id=0)
    second = samples()
    fresh = gpt_dataset(dataset, 32, tmp_path / "fresh")
    assert second == [[*fresh[n]["tokens"].tolist(), int(fresh[n]["labels"][-1])] for n in range(len(fresh))]
    assert len(tuple((tmp_path / "cache").glob("[0-9a-f]*"))) == 2


def test_start_and_verify_see_stale_and_cut_indices(dataset: str, tmp_path: Path) -> None:
    """`open_source`, a run's start: the old index of data made anew is not used, a cut one is built again."""
    data = Data.model_validate({"sequence_length": 32, "train": [{"path": dataset}]})

    def samples() -> list[list[int]]:
        source = open_source(dataset, data, VOCAB)
        return [source.text(n).tolist() for n in range(len(source))]

    first = samples()
    (index,) = Path(dataset).parent.glob(".index/[0-9a-f]*")
    assert f"{index}: a whole sample index of this dataset, 32 tokens a sample" in verify(dataset)
    for cut in (*index.glob("*.npy"), index / "cache.json"):
        content = cut.read_bytes()
        cut.write_bytes(content[:-16])
        assert f"{index}: a damaged sample index; a run that needs it builds it again" in verify(dataset)
        assert samples() == first
        assert cut.read_bytes() == content
    write_dataset(dataset, random_documents(3, count=100), vocab_size=VOCAB, eod_id=0)
    assert "1 sample indices of other data" in verify(dataset)[-1]
    second = samples()
    write_dataset(tmp_path / "fresh" / "data", random_documents(3, count=100), vocab_size=VOCAB, eod_id=0)
    fresh = open_source(str(tmp_path / "fresh" / "data"), data, VOCAB)
    assert second == [fresh.text(n).tolist() for n in range(len(fresh))]
    assert second[: len(first)] != first
