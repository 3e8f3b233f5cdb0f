"""Every damage that Megatron accepts is refused: at the start of a run, or by reading all."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.inspect import verify
from data_prep.writer import write_dataset
from remit_megatron.data import manifest as manifest_module
from remit_megatron.data.indexed import HEADER_BYTES, bin_path, idx_path, open_index
from remit_megatron.data.manifest import (
    Manifest,
    fingerprint,
    manifest_path,
    quick_verify,
    verify_content,
)
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import UserError
from tests.data.conftest import VOCAB, random_documents


def change(path: Path, position: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = path.read_bytes()
    change(path, position % len(content), bytes([content[position] ^ 1 << bit]))


def test_sound(dataset: str) -> None:
    info = quick_verify(dataset, vocab_size=VOCAB, tokenizer_hash="aa")
    documents = random_documents(0)
    assert info.num_documents == len(documents)
    assert info.num_tokens == sum(len(ids) + 1 for ids in documents)
    assert info.largest_id == max(int(ids.max()) for ids in documents)
    assert (info.eod_id, info.tokenizer_hash, info.warnings, len(info.fingerprint)) == (0, "aa", (), 64)
    assert verify_content(dataset) == (Manifest.read(dataset), True)
    indexed = open_index(dataset)
    for number in (0, 7, len(documents) - 1):
        assert indexed.document(number).tolist() == [*documents[number], 0]
    with pytest.raises(UserError, match="document 400 does not exist"):
        indexed.document(400)


HAZARDS: dict[str, tuple[Callable[[str], None], str]] = {
    ".bin cut": (lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes()[:-2]), r"data.bin: damaged: .* bytes, but"),
    ".bin longer": (lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes() + b"ab"), r"data.bin: damaged"),
    ".bin empty": (lambda p: bin_path(p).write_bytes(b""), r"data.bin: damaged"),
    ".bin missing": (lambda p: bin_path(p).unlink(), r"data.bin: no such file"),
    ".idx missing": (lambda p: idx_path(p).unlink(), r"data.idx: no such file"),
    ".idx empty": (lambda p: idx_path(p).write_bytes(b""), r"data.idx: damaged: 0 bytes are too few"),
    ".idx cut": (lambda p: idx_path(p).write_bytes(idx_path(p).read_bytes()[:-8]), r"data.idx: damaged: .* asks for"),
    "magic": (lambda p: flip(idx_path(p), 3), r"data.idx: no index of Megatron's"),
    "version": (lambda p: flip(idx_path(p), 9, 1), r"data.idx: format version 3"),
    "dtype int32": (lambda p: change(idx_path(p), 17, b"\x04"), r"data.idx: damaged: sequence 1 is said to begin"),
    "dtype int16": (lambda p: change(idx_path(p), 17, b"\x03"), r"data.idx: damaged: dtype code 3"),
    "dtype float32": (lambda p: change(idx_path(p), 17, b"\x07"), r"data.idx: damaged: dtype code 7"),
    "sequence count": (lambda p: flip(idx_path(p), 18), r"data.idx: damaged: .* asks for"),
    "huge count": (lambda p: flip(idx_path(p), 25, 7), r"data.idx: damaged: impossible counts"),
    "length": (lambda p: flip(idx_path(p), HEADER_BYTES + 4 * 100), r"data.idx: damaged: sequence 101 is said"),
    "negative length": (
        lambda p: flip(idx_path(p), HEADER_BYTES + 4 * 100 + 3, 7),
        r"damaged: sequence 100 has the length -",
    ),
    "last length": (lambda p: flip(idx_path(p), HEADER_BYTES + 4 * 399), r"data.bin: damaged"),
    "pointer": (lambda p: flip(idx_path(p), HEADER_BYTES + 4 * 400 + 8 * 200), r"damaged: sequence 200 is said"),
    "mark": (lambda p: flip(idx_path(p), HEADER_BYTES + 12 * 400 + 8 * 9, 6), r"damaged: document mark 10 is smaller"),
    "last mark": (lambda p: flip(idx_path(p), HEADER_BYTES + 12 * 400 + 8 * 400), r"damaged: document marks run"),
}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("name", HAZARDS)
def test_structure(name: str, with_manifest: bool, dataset: str) -> None:
    """Seen with and without a manifest, at start and by `verify`."""
    damage, message = HAZARDS[name]
    if not with_manifest:
        manifest_path(dataset).unlink()
    damage(dataset)
    for check in (quick_verify, verify):
        with pytest.raises(UserError, match=message):
            check(dataset)


def test_every_bit_of_idx(tmp_path: Path) -> None:
    """No flipped bit of a small .idx passes; without manifest none of header, lengths and pointers does."""
    prefix = str(tmp_path / "data")
    write_dataset(prefix, [[1, 2, 3], [4], [5, 6]], vocab_size=9, append_eod=False)
    original = idx_path(prefix).read_bytes()
    for manifest in (True, False):
        if not manifest:
            manifest_path(prefix).unlink()
        checked = len(original) if manifest else HEADER_BYTES + 3 * 12
        for position in range(checked):
            for bit in range(8):
                flip(idx_path(prefix), position, bit)
                with pytest.raises(UserError):
                    quick_verify(prefix)
                idx_path(prefix).write_bytes(original)
    quick_verify(prefix)


def test_consistent_changes_of_idx_need_the_manifest(dataset: str) -> None:
    """Two documents' lengths exchanged with their pointers: a possible structure, but another content."""
    lengths = open_index(dataset).lengths.copy()
    lengths[[3, 4]] = lengths[[4, 3]]
    pointers = (np.cumsum(lengths) - lengths) * 2
    raw = idx_path(dataset).read_bytes()
    content = raw[:HEADER_BYTES] + lengths.tobytes() + pointers.astype("<i8").tobytes() + raw[HEADER_BYTES + 12 * 400 :]
    idx_path(dataset).write_bytes(content)
    with pytest.raises(UserError, match=r"data.idx: its SHA-256 is not the manifest's"):
        quick_verify(dataset)


def test_flipped_bits_of_bin(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and last block are read at start; one between only by a full check, which reads all."""
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 4096)
    prefix = dataset + "2"
    from data_prep import writer

    monkeypatch.setattr(writer.BlockHasher.__init__, "__defaults__", (4096,))
    write_dataset(prefix, random_documents(1), vocab_size=VOCAB, eod_id=0)
    size = bin_path(prefix).stat().st_size
    for position, quick in ((0, True), (size - 1, True), (size // 2, False)):
        flip(bin_path(prefix), position)
        if quick:
            with pytest.raises(UserError, match=r"data2.bin: the .* block \d+ does not have the manifest's SHA-256"):
                quick_verify(prefix)
        else:
            quick_verify(prefix)
        with pytest.raises(UserError, match=r"data2.bin: the .* block \d+ does not have"):
            verify(prefix, full=True)
        flip(bin_path(prefix), position)
    assert verify(prefix, full=True)[0].endswith("blocks have the manifest's SHA-256")


def test_regenerated_under_the_same_name(dataset: str, tmp_path: Path) -> None:
    """Another content is another fingerprint; a mixture of old and new files is refused."""
    old = quick_verify(dataset).fingerprint
    files = {path: path.read_bytes() for path in (bin_path(dataset), idx_path(dataset), manifest_path(dataset))}
    same_shape = [ids[::-1] for ids in random_documents(0)]
    write_dataset(dataset, same_shape, vocab_size=VOCAB, eod_id=0, tokenizer_hash="aa")
    assert quick_verify(dataset).fingerprint != old
    for path, content in files.items():
        new = path.read_bytes()
        if new != content:
            path.write_bytes(content)
            with pytest.raises(UserError, match="SHA-256"):
                quick_verify(dataset)
            path.write_bytes(new)
    write_dataset(dataset, random_documents(0)[:-1], vocab_size=VOCAB, eod_id=0)
    manifest_path(dataset).write_bytes(files[manifest_path(dataset)])
    with pytest.raises(UserError, match=r"num_tokens is \d+, but data.manifest.json says"):
        quick_verify(dataset)


def test_fingerprint_is_of_content(dataset: str, tmp_path: Path) -> None:
    """Name, provenance and tokenizer do not count; every id and every border does."""
    documents = random_documents(0)
    made = write_dataset(tmp_path / "b", documents, vocab_size=VOCAB, eod_id=0, provenance={"x": 1})
    assert fingerprint(made) == quick_verify(dataset).fingerprint
    joined = [np.concatenate([documents[0], [0], documents[1]]), *documents[2:]]
    assert fingerprint(write_dataset(tmp_path / "c", joined, vocab_size=VOCAB, eod_id=0)) != fingerprint(made)
    assert bin_path(tmp_path / "c").read_bytes() == bin_path(tmp_path / "b").read_bytes()
    wide = write_dataset(tmp_path / "d", documents, vocab_size=100_000, eod_id=0)
    assert fingerprint(wide) != fingerprint(made)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_ids_past_the_vocabulary(with_manifest: bool, dataset: str) -> None:
    if not with_manifest:
        manifest_path(dataset).unlink()
    largest = quick_verify(dataset).largest_id
    quick_verify(dataset, vocab_size=largest + 1)
    for check in (quick_verify, verify):
        with pytest.raises(
            UserError, match=f"data.bin: token id {largest} is outside the model's vocabulary of {largest}"
        ):
            check(dataset, vocab_size=largest)


def test_negative_ids(tmp_path: Path) -> None:
    """int32 data of another program can hold them."""
    prefix = str(tmp_path / "data")
    write_dataset(prefix, [[1, 2], [3]], vocab_size=100_000, append_eod=False)
    manifest_path(prefix).unlink()
    change(bin_path(prefix), 4, struct.pack("<i", -5))
    with pytest.raises(UserError, match="token 1 is -5; ids are never negative"):
        quick_verify(prefix)


def test_foreign_tokenizer(dataset: str, foreign: str) -> None:
    write_dataset(dataset, random_documents(0), vocab_size=VOCAB, eod_id=0, tokenizer_hash="aa")
    for check in (lambda: quick_verify(dataset, tokenizer_hash="bb"),):
        with pytest.raises(UserError, match="made with the tokenizer aa, not with the one named, bb"):
            check()
    manifest_path(foreign).unlink()
    assert "nothing says which tokenizer made it" in quick_verify(foreign, tokenizer_hash="bb").warnings[-1]


def test_without_manifest(foreign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, a scan of all ids, and for large data samples with another warning."""
    info = quick_verify(foreign)
    documents = random_documents(0)
    assert info.largest_id == max(int(ids.max()) for ids in documents)
    assert len(info.warnings) == 1
    assert "verify --adopt" in info.warnings[0]
    flip(bin_path(foreign), 5000)
    assert quick_verify(foreign).fingerprint != info.fingerprint
    monkeypatch.setattr(manifest_module, "SCAN_BYTES", 1000)
    monkeypatch.setattr(manifest_module, "SAMPLE_BYTES", 64)
    sampled = quick_verify(foreign)
    assert "come from 64 samples" in sampled.warnings[1]
    assert sampled.largest_id <= info.largest_id


def test_adopt(foreign: str, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(UserError, match="document 0 does not end with the EOD token 7"):
        verify(foreign, adopt=True, eod_id=7)
    assert not manifest_path(foreign).exists()
    lines = verify(foreign, adopt=True, eod_id=0, tokenizer=str(tokenizer), vocab_size=VOCAB)
    assert "written" in lines[0]
    info = quick_verify(foreign, tokenizer_hash=tokenizer_hash(tokenizer))
    assert (info.eod_id, info.warnings) == (0, ())
    ours = write_dataset(tmp_path / "ours", random_documents(0), vocab_size=VOCAB, eod_id=0)
    assert info.fingerprint == fingerprint(ours)
    with pytest.raises(UserError, match="exists already"):
        verify(foreign, adopt=True)


def test_damaged_manifest(dataset: str) -> None:
    good = manifest_path(dataset).read_text()
    cases = [
        (good[:-20], "no valid manifest"),
        (good.replace('"num_documents": 400', '"num_documents": "x"'), "no valid manifest"),
        (good.replace('"format": 1', '"format": 9'), "format 9 is unknown"),
        (good.replace('"largest_id": 999', '"largest_id": 998'), "damaged or edited"),
        ("[]", "no valid manifest"),
    ]
    for content, message in cases:
        assert content != good
        manifest_path(dataset).write_text(content)
        with pytest.raises(UserError, match=message):
            quick_verify(dataset)


def test_wrong_largest_id_is_found_by_a_full_check(dataset: str) -> None:
    manifest = Manifest.read(dataset)
    assert manifest is not None
    manifest.model_copy(update={"largest_id": 5}).write(dataset)
    quick_verify(dataset, vocab_size=6)
    with pytest.raises(UserError, match=r"says that the largest id is 5, in fact it is 999"):
        verify_content(dataset)


def test_full_check_reads_the_ends(dataset: str) -> None:
    manifest = Manifest.read(dataset)
    assert manifest is not None
    manifest.model_copy(update={"eod_id": 3}).write(dataset)
    with pytest.raises(UserError, match="document 0 does not end with the EOD token 3"):
        verify_content(dataset)


def test_tokenizer_hash_is_of_content(tmp_path: Path) -> None:
    """Formatting, padding, truncation and the two spellings of merges do not count; a merge does."""
    base = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "b c"]}, "padding": None}
    same = {"model": {"merges": [["a", "b"], ["b", "c"]], "vocab": {"a": 0}, "type": "BPE"}, "truncation": {"max": 3}}
    other = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c", "a b"]}}
    hashes = []
    for number, content in enumerate((base, same, other)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "tokenizer.json").write_text(json.dumps(content, indent=number))
        hashes.append(tokenizer_hash(tmp_path / str(number)))
    assert hashes[0] == hashes[1] == tokenizer_hash(tmp_path / "0" / "tokenizer.json")
    assert hashes[2] != hashes[0]
    (tmp_path / "no.json").write_text("{}")
    for name, message in (("no.json", "no tokenizer"), ("none", "no readable")):
        with pytest.raises(UserError, match=message):
            tokenizer_hash(tmp_path / name)
