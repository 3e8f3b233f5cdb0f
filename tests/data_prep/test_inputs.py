"""Files as they are found in the wild: read as meant, or refused by name."""

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer

import remit_megatron
from data_prep.tokenize import TokenizeSettings, tokenize
from remit_megatron.data.indexed import open_index
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import UserError

TEXTS = ["one", "two\n", "caf\u00e9 \U0001f600", "", "four"]
KEPT = [text for text in TEXTS if text]


@pytest.fixture
def texts_of(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> Callable[..., list[str]]:
    """Tokenizes the inputs named and gives the documents' texts back."""
    folder = tokenizer_dirs["olmo2"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run(*names: Path | str, **settings: object) -> list[str]:
        output = str(tmp_path / "output" / "data")
        inputs = [str(name) for name in names]
        tokenize(TokenizeSettings(inputs=inputs, tokenizer=str(folder), output=output, workers=1, overwrite=True,
                                  **settings))  # type: ignore[arg-type]  # fmt: skip
        data = open_index(output)
        return [tokenizer.decode(data.document(n)) for n in range(data.num_documents)]

    return run


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_json_files_that_are_no_lines(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    """An array, one object over many lines, and lines under the same ending."""
    records = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, indent=1))
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_text(json.dumps({"level": 5, "text": "a problem"}, indent=4))
    (tmp_path / "d.json").write_bytes(lines(TEXTS))
    assert texts_of(tmp_path / "[a-d].json") == [*KEPT, *KEPT, "a problem", *KEPT]
    (tmp_path / "e.json").write_text(json.dumps([{"text": "good"}, {"no": 1}, {"text": None}, "x", {"text": "last"}]))
    assert texts_of(tmp_path / "e.json") == ["good", "last"]
    bad = [json.loads(line) for line in (tmp_path / "output" / "data.bad.jsonl").read_text().splitlines()]
    assert [(record["row"], record["reason"]) for record in bad] == [
        (1, "no key 'text'"),
        (2, "'text' holds null, not a string"),
        (3, "a JSON str where an object is expected"),
    ]
    (tmp_path / "f.json").write_text("[\n" + json.dumps({"text": "cut"}))
    with pytest.raises(UserError, match=r"f.json: no valid JSON.*one JSON object a line"):
        texts_of(tmp_path / "f.json")


def test_large_json_array_is_refused(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b"[" + b" " * 5000)
        file.truncate((64 << 20) + 1)
    with pytest.raises(UserError, match=r"one JSON value of 64 MiB.*jq -c '\.\[\]'"):
        texts_of(tmp_path / "a.json")


def test_names_and_empty_files(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    """Nested folders, one name twice, any script, no newline at the end, an ending in capitals, empty files."""
    folder = tmp_path / "\u6587 \u00fcml"
    for name, content in {
        "a/x.jsonl": lines(["1"]), "b/c/x.jsonl": lines(["2"])[:-1], "b/x.JSONL": lines(["3"]), "b/empty.jsonl": b"",
        "b/none.jsonl.gz": gzip.compress(b""), "b/void.jsonl.zst": zstandard.compress(b""), "c[1]/*.txt": b"4",
        "c[1]/z.txt": b"",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert texts_of(folder) == ["1", "2", "3", "4"]
    os.symlink(folder / "a" / "x.jsonl", tmp_path / "link.jsonl")
    with pytest.raises(UserError, match=r"link.jsonl: named twice among the inputs \(also as .*a/x.jsonl\)"):
        texts_of(folder, tmp_path / "link.jsonl")


def test_output_inside_the_input_folder(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """What an earlier or unfinished run left there is no input; nor is the card of a dataset beside its data."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(["one", "two"]))
    (folder / "b.jsonl").write_bytes(b"bad\n")
    (folder / "README.md").write_text("---\nlicense: x\n---\n# Card")
    settings = TokenizeSettings(
        inputs=[str(folder)], tokenizer=str(tokenizer_dirs["olmo2"]), output=str(folder / "tokens"), workers=1,
        overwrite=True, max_bad=0,
    )  # fmt: skip
    with pytest.raises(UserError, match="--max-bad allows 0"):
        tokenize(settings)
    assert (folder / "tokens.parts" / "plan.json").exists()
    first = tokenize(dataclasses.replace(settings, max_bad=1))
    assert {path.name for path in folder.iterdir()} == {"a.jsonl", "b.jsonl", "README.md", "tokens.bin", "tokens.idx",
                                                        "tokens.manifest.json", "tokens.bad.jsonl"}  # fmt: skip
    assert tokenize(dataclasses.replace(settings, max_bad=1)) == first
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).unlink()
    assert tokenize(settings).num_documents == 1, "a folder of plain text: its README is a document"
    for output in (str(tmp_path / "new") + "/", str(folder)):
        with pytest.raises(UserError, match="a folder; a dataset is a prefix such as"):
            tokenize(dataclasses.replace(settings, output=output))


def test_zstd_with_a_long_window(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    """As `zstd --long=31` writes; a decoder refuses windows above 128 MiB unless it is told to take them."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(lines(TEXTS)) + compressor.flush())
    assert texts_of(tmp_path / "a.jsonl.zst") == KEPT


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        pyarrow.array([text.encode() for text in TEXTS], pyarrow.large_binary()),
    ],
)
def test_column_types(column: pyarrow.Array, tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == KEPT


def test_parquet_refusals(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    path = tmp_path / "a.parquet"
    for column, kind in ((pyarrow.array([1]), "int64"), (pyarrow.array([["a"]]), "list")):
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "body": ["b"]}), path)
        with pytest.raises(UserError, match=rf"a.parquet: column 'text' holds {kind}.*text, body"):
            texts_of(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a.parquet: no valid parquet file"):
        texts_of(path)
    path.write_bytes(whole[:4] + bytes(byte ^ 0xFF for byte in whole[4:40]) + whole[40:])
    with pytest.raises(UserError, match=r"a.parquet: row group 0 is damaged"):
        texts_of(path)


def test_parquet_page_checksums(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    """Written, and so looked at: a flipped bit in a page is no other text."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"document number {n} of some length" for n in range(50)]})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    assert len(texts_of(path)) == 50
    whole = path.read_bytes()
    where = whole.index(b"number 30") + 7
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    with pytest.raises(UserError, match=r"a.parquet: row group 0 is damaged \(.*CRC"):
        texts_of(path)


def test_two_columns_of_one_name(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: 2 columns are called 'text': rename all but one"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["gz", "zst", "zstd"])
def test_damaged_archives(ending: str, tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    """Of 0 bytes, or with a flipped bit of its content: one line that names it, and no work folder without tokens."""
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="an archive of 0 bytes"):
        texts_of(path)
    content = lines([f"text {n}" for n in range(200)])
    whole = (
        gzip.compress(content) if ending == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    for place in range(12, len(whole), len(whole) // 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"a.jsonl.\w+: damaged or cut short"):
            texts_of(path)
        assert list((tmp_path / "output").iterdir()) == []
    path.write_bytes(whole)
    assert len(texts_of(path)) == 200


def test_names_of_outputs(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """The longest that every file of a dataset can have, and one more, before anything is read."""
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    settings = TokenizeSettings(
        inputs=[str(tmp_path / "a.jsonl")], tokenizer=str(tokenizer_dirs["olmo2"]), output=str(tmp_path / ("o" * 241)),
        workers=1,
    )  # fmt: skip
    assert tokenize(settings).num_documents == 1
    with pytest.raises(UserError, match="a name of 242 bytes; 241 are possible"):
        tokenize(dataclasses.replace(settings, output=settings.output + "o"))


def test_saved_dataset_without_rows_or_text(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    datasets.Dataset.from_dict({"text": [[1]], "body": ["b"]}).save_to_disk(str(tmp_path / "lists"))
    datasets.Dataset.from_dict({"text": ["a", None, "c"]}).select([2, 1]).save_to_disk(str(tmp_path / "some"))
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(str(tmp_path / "splits"))
    for name, message in (
        ("empty", "cannot be opened or is empty"),
        ("lists", "column 'text' holds list.*text, body"),
        ("splits", "several splits; name one of them: train"),
    ):
        with pytest.raises(UserError, match=message):
            texts_of(tmp_path / name)
    assert texts_of(tmp_path / "lists", text_key="body") == ["b"]
    assert texts_of(tmp_path / "some") == ["c"]
    assert texts_of(tmp_path / "splits" / "train") == ["a"]


def test_nothing_usable_says_why(tmp_path: Path, texts_of: Callable[..., list[str]]) -> None:
    (tmp_path / "a.jsonl").write_text("text,label\nx,1\n")
    with pytest.raises(UserError, match=r"no token to write: .* for example at byte 0: no valid JSON"):
        texts_of(tmp_path / "a.jsonl")


def test_manifest_says_what_was_made_of_what(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Every field against what the files themselves hold."""
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + b"bad\n")
    folder, output = tokenizer_dirs["olmo2"], tmp_path / "data"
    tokenize(
        TokenizeSettings(
            inputs=[str(tmp_path / "a.jsonl")], tokenizer=str(folder), output=str(output), workers=1, append_eod=True
        )
    )
    found = json.loads(Path(f"{output}.manifest.json").read_text())
    tokens = np.fromfile(f"{output}.bin", dtype=np.uint16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    source = (tmp_path / "a.jsonl").read_bytes()

    def sha256(raw: bytes) -> str:
        return hashlib.sha256(raw).hexdigest()

    assert len(found.pop("checksum")) == 64
    assert found == {
        "format": 1,
        "tool": f"remit-megatron {remit_megatron.__version__}",
        "dtype": "uint16",
        "num_tokens": len(tokens),
        "num_documents": 4,
        "num_sequences": 4,
        "largest_id": int(tokens.max()),
        "vocab_size": tokenizer.get_vocab_size(),
        "eod_id": tokenizer.token_to_id("<|endoftext|>"),
        "tokenizer_hash": tokenizer_hash(folder),
        "bin_bytes": 2 * len(tokens),
        "block_bytes": 64 << 20,
        "bin_sha256": [sha256(tokens.tobytes())],
        "idx_sha256": sha256(Path(f"{output}.idx").read_bytes()),
        "provenance": {
            "command": "tokenize",
            "inputs": [
                {
                    "path": str(tmp_path / "a.jsonl"),
                    "kind": "jsonl",
                    "bytes": len(source),
                    "first_last_mib_sha256": sha256(source + source),
                }
            ],
            "left_out": {},
            "text_key": "text",
            "max_document_mib": None,
            "piece_bytes": None,
            "files_read": 1,
            "backend": f"gigatoken {version('gigatoken')}",
            "shard": None,
            "empty": 1,
            "bad": 1,
        },
    }


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eod_token_of_the_tokenizer(name: str, tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Written as a string or an object, in either file; where neither has one, the message lists the added tokens."""
    (tmp_path / "a.txt").write_text("one")
    shutil.copy(tokenizer_dirs["olmo2"] / "tokenizer.json", tmp_path)
    settings = TokenizeSettings(
        inputs=[str(tmp_path / "a.txt")], tokenizer=str(tmp_path), output=str(tmp_path / "data"), workers=1,
        append_eod=True, overwrite=True,
    )  # fmt: skip
    for eos in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (tmp_path / name).write_text(json.dumps({"eos_token": eos}))
        assert tokenize(settings).eod_id == 0
    for text, message in (
        ("{}", r"eos_token is missing; name the EOD token with --eod-token \(added tokens: <.endoftext.>\)"),
        ("[]", f"{name}: is no JSON object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            tokenize(settings)
