"""The same documents in every format and place that tokenization reads give the same dataset."""

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer

from data_prep import readers
from data_prep.tokenize import TokenizeSettings, tokenize
from remit_megatron.data.indexed import open_index
from remit_megatron.errors import UserError
from tests.data_prep.conftest import our_files, run


def compressed(path: Path, text: bytes, kind: str) -> Path:
    """With two frames or members, which a reader must read across."""
    half = len(text) // 2
    if kind == "gz":
        path.write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]))
    else:
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        path.write_bytes(compressor.compress(text[:half]) + zstandard.ZstdCompressor().compress(text[half:]))
    return path


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed(
    kind: str,
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    plain: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 5000)  # many parts of one file
    path = compressed(tmp_path / f"in.jsonl.{kind}", plain[0].read_bytes(), kind)
    run(path, tokenizer_dirs["olmo2"], tmp_path / "data", part_bytes=10_000)
    assert our_files(tmp_path / "data") == our_files(plain[1])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or cut short"):
        run(path, tokenizer_dirs["olmo2"], tmp_path / "cut")


@pytest.mark.parametrize("column", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(
    column: pyarrow.DataType,
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    documents: list[str],
    plain: tuple[Path, Path],
) -> None:
    table = pyarrow.table({"n": range(len(documents)), "body": pyarrow.array(documents, pyarrow.string()).cast(column)})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=150)
    run(tmp_path / "in.parquet", tokenizer_dirs["olmo2"], tmp_path / "data", text_key="body", part_bytes=1)
    assert our_files(tmp_path / "data") == our_files(plain[1])
    with pytest.raises(UserError, match=r"no column 'text'.*n, body"):
        run(tmp_path / "in.parquet", tokenizer_dirs["olmo2"], tmp_path / "other")


def test_saved_dataset(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], documents: list[str], plain: tuple[Path, Path]
) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(tmp_path / "saved"))
    run(tmp_path / "saved", tokenizer_dirs["olmo2"], tmp_path / "data", task_bytes=30_000)
    assert our_files(tmp_path / "data") == our_files(plain[1])


def test_streamed_dataset(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    """What `hf:` opens from the hub is opened here from a folder, by the same call."""
    folder = tmp_path / "repository"
    folder.mkdir()
    lines = plain[0].read_text(encoding="utf-8").split("\n")
    for number, start in enumerate(range(0, len(lines), 200)):
        part = "\n".join(lines[start : start + 200])
        (folder / f"train-{number}.jsonl").write_text(part, encoding="utf-8", newline="")
    name = f"hf:{folder}:train"
    tokenize(
        TokenizeSettings(
            inputs=[name],
            tokenizer=str(tokenizer_dirs["olmo2"]),
            output=str(tmp_path / "data"),
            workers=1,
            append_eod=True,
        )
    )
    assert our_files(tmp_path / "data") == our_files(plain[1])


def test_folders_globs_and_order(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    lines = plain[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines[:100]))
    compressed(tmp_path / "in" / "b.jsonl.gz", b"".join(lines[100:200]), "gz")
    (tmp_path / "in" / "deep" / "c.jsonl").write_bytes(b"".join(lines[200:]))
    run(tmp_path / "in", tokenizer_dirs["olmo2"], tmp_path / "folder")
    (tmp_path / "in" / "readme.rst").write_text("not data")
    run(tmp_path / "in" / "**" / "*.jsonl*", tokenizer_dirs["olmo2"], tmp_path / "glob")
    assert our_files(tmp_path / "folder") == our_files(tmp_path / "glob") == our_files(plain[1])
    twice = [tmp_path / "in", tmp_path / "in" / "a.jsonl"]
    with pytest.raises(UserError, match="named twice"):
        run(twice, tokenizer_dirs["olmo2"], tmp_path / "twice", skip_unknown=True)
    for name, message in (("*.none", "no such file"), ("readme.rst", "of an ending that is not read")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "in" / name, tokenizer_dirs["olmo2"], tmp_path / "other")


def test_plain_text(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """A file is a document, or a line is; a BOM at the start is no text, one elsewhere is."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dirs["olmo2"] / "tokenizer.json"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst line\r\n\r\nsecond \xef\xbb\xbf line")
    (tmp_path / "b.txt").write_bytes(b"\n")
    (tmp_path / "c.txt").write_bytes(b"")
    run([tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"], tokenizer_dirs["olmo2"], tmp_path / "files")
    files = open_index(tmp_path / "files")
    assert tokenizer.decode(files.document(0)[:-1]) == "first line\r\n\r\nsecond \ufeff line"
    assert (files.num_documents, tokenizer.decode(files.document(1)[:-1])) == (2, "\n")
    run(tmp_path / "a.txt", tokenizer_dirs["olmo2"], tmp_path / "lines", text_lines=True)
    lines = open_index(tmp_path / "lines")
    texts = [tokenizer.decode(lines.document(n)[:-1]) for n in range(lines.num_documents)]
    assert texts == ["first line", "second \ufeff line"]
