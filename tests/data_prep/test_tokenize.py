"""Tokens equal the Hugging Face tokenizer's, bytes equal Megatron's builder's, whatever the format or workers."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from data_prep.merge import merge
from remit_megatron.data.indexed import open_index
from remit_megatron.data.manifest import fingerprint
from remit_megatron.errors import UserError
from tests.data_prep.conftest import megatron_files, our_files, run
from tests.data_prep.tokenizers import EOD, KINDS

BACKEND = {"youtu": "tokenizers", "nfc": "tokenizers"}
"""gigatoken knows no such split, and its NFC differs on characters of newer Unicode versions; else it is exact."""


@pytest.mark.parametrize("kind", KINDS)
def test_parity(
    kind: str,
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    reference_ids: dict[str, list[np.ndarray]],
    write_jsonl: Callable[..., Path],
) -> None:
    """Every document of the corpus, hostile ones among them, through small pieces that cut the file anywhere."""
    manifest = run(write_jsonl(tmp_path / "in.jsonl"), tokenizer_dirs[kind], tmp_path / "ours", task_bytes=5003)
    vocab_size = Tokenizer.from_file(str(tokenizer_dirs[kind] / "tokenizer.json")).get_vocab_size()
    assert our_files(tmp_path / "ours") == megatron_files(tmp_path / "theirs", reference_ids[kind], vocab_size)
    assert manifest.provenance["backend"].split()[0] == BACKEND.get(kind, "gigatoken")
    assert manifest.largest_id == max(int(ids.max()) for ids in reference_ids[kind])
    assert manifest.eod_id == reference_ids[kind][0][-1]


def test_both_backends_agree(tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ascii_only=True)
    fast = run(path, tokenizer_dirs["olmo2"], tmp_path / "fast", backend="gigatoken")
    slow = run(path, tokenizer_dirs["olmo2"], tmp_path / "slow", backend="tokenizers")
    assert fingerprint(fast) == fingerprint(slow)
    with pytest.raises(UserError, match="--backend gigatoken: gigatoken cannot load"):
        run(path, tokenizer_dirs["youtu"], tmp_path / "other", backend="gigatoken")


@pytest.mark.parametrize("task_bytes", [1, 1777, 100_000])
def test_pieces_do_not_matter(
    task_bytes: int, tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]
) -> None:
    """Cuts fall on, before and after line ends: with pieces of one byte, everywhere."""
    text = plain[0].read_bytes()
    small = tmp_path / "in.jsonl"
    small.write_bytes(text if task_bytes > 1 else b"\n".join(text.split(b"\n")[:12]) + b"\n")
    if task_bytes > 1:
        run(small, tokenizer_dirs["olmo2"], tmp_path / "data", task_bytes=task_bytes, part_bytes=1)
        assert our_files(tmp_path / "data") == our_files(plain[1])
    else:
        run(small, tokenizer_dirs["olmo2"], tmp_path / "one")
        run(small, tokenizer_dirs["olmo2"], tmp_path / "data", task_bytes=max(1, small.stat().st_size // 200))
        assert our_files(tmp_path / "data") == our_files(tmp_path / "one")


def test_workers_do_not_matter(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    """Bytes and manifest are those of one worker."""
    run(plain[0], tokenizer_dirs["olmo2"], tmp_path / "data", workers=3, task_bytes=20_000)
    assert our_files(tmp_path / "data") == our_files(plain[1])
    assert Path(f"{tmp_path}/data.manifest.json").read_text() == Path(f"{plain[1]}.manifest.json").read_text()
    assert not Path(f"{tmp_path}/data.parts").exists()


def test_shards_and_merge(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    prefixes = []
    for index in range(3):
        prefixes.append(str(tmp_path / f"data-{index}-of-3"))
        run(plain[0], tokenizer_dirs["olmo2"], Path(prefixes[-1]), shard=(index, 3), task_bytes=9000)
    merge(prefixes, str(tmp_path / "data"))
    assert our_files(tmp_path / "data") == our_files(plain[1])
    for some in (prefixes[:2], prefixes[::-1]):
        with pytest.raises(UserError, match="0/3 to 2/3 in this order"):
            merge(some, str(tmp_path / "other"))
    with pytest.raises(UserError, match="use 1 shards or fewer"):
        run(plain[0], tokenizer_dirs["olmo2"], tmp_path / "x", shard=(0, 9))


def test_bad_documents_are_put_aside(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Good lines around each bad one survive; every bad one is recorded with where it begins."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dirs["olmo2"] / "tokenizer.json"))
    bad = {
        b'{"text": "cut': "no valid JSON",
        b'{"text": "\xff\xfe"}': "no valid JSON",
        b'{"text": "\\ud800"}': "no valid JSON",
        b'{"other": "x"}': "no key 'text'",
        b'{"text": null}': "holds null",
        b'{"text": 7}': "holds int",
        b'["text"]': "a JSON list",
        b'{"text": "' + b"x" * (1 << 20) + b'"}': "longer than 1,048,576 bytes",
    }
    lines, offsets, texts = [b"\xef\xbb\xbf" + b'{"text": "first"}'], [], ["first"]
    for number, line in enumerate(bad):
        offsets.append(sum(len(part) + 1 for part in lines))
        lines += [line, b'  {"text": "good %d"} \r' % number, b"", b'{"text": ""}']
        texts.append(f"good {number}")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    for workers, task_bytes in ((1, 1 << 20), (1, 40)):
        output = tmp_path / f"data-{task_bytes}"
        settings = dict(max_document_mib=1, task_bytes=task_bytes if task_bytes > 40 else 100_000, part_bytes=1)
        manifest = run(tmp_path / "in.jsonl", tokenizer_dirs["olmo2"], output, workers=workers, **settings)
        data = open_index(output)
        assert [tokenizer.decode(data.document(n)[:-1]) for n in range(data.num_documents)] == texts
        records = [json.loads(line) for line in Path(f"{output}.bad.jsonl").read_text().splitlines()]
        assert [record["byte"] for record in records] == offsets
        assert all(reason in record["reason"] for record, reason in zip(records, bad.values(), strict=True))
        assert (manifest.provenance["bad"], manifest.provenance["empty"]) == (len(bad), len(bad))


def test_max_bad(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Too many stop the run; the same command with a higher limit goes on, and nothing half-made is seen before."""
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\nbad\n' * 50)
    with pytest.raises(
        UserError, match=r"in.jsonl: \d+ documents could not be read, --max-bad allows 10.*at byte 17: no"
    ):
        run(tmp_path / "in.jsonl", tokenizer_dirs["olmo2"], tmp_path / "data", max_bad=10, task_bytes=64)
    assert not Path(f"{tmp_path}/data.idx").exists()
    manifest = run(tmp_path / "in.jsonl", tokenizer_dirs["olmo2"], tmp_path / "data", max_bad=50, task_bytes=64)
    assert (manifest.num_documents, manifest.provenance["bad"]) == (50, 50)


def test_rows_that_are_no_text(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    column = pyarrow.array([b"one", None, b"\xff", b"", b"two"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet", row_group_size=2)
    manifest = run(tmp_path / "in.parquet", tokenizer_dirs["olmo2"], tmp_path / "data")
    records = [json.loads(line) for line in Path(f"{tmp_path}/data.bad.jsonl").read_text().splitlines()]
    assert [(r["piece"], r["row"], r["reason"].split(" at")[0]) for r in records] == [
        (0, 1, "null, not a string"),
        (1, 0, "invalid UTF-8"),
    ]
    assert (manifest.num_documents, manifest.provenance["empty"]) == (2, 1)


def test_refusals(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    folder = tokenizer_dirs["olmo2"]
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    cases: list[tuple[dict[str, object], str]] = [
        (dict(folder=tmp_path / "none"), "no such file"),
        (dict(folder=tmp_path / "bad.json"), "no tokenizer"),
        (dict(eod_token="<nope>"), "'<nope>' is no token.*<.endoftext"),
        (dict(folder=folder / "tokenizer.json", vocab_size=10), "--vocab-size 10 is smaller than the 496 ids"),
        (dict(inputs=tmp_path / "empty.jsonl"), "every file is empty"),
        (dict(inputs=tmp_path / "blank.jsonl"), "no token to write"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            run(**({"inputs": plain[0], "folder": folder, "output": tmp_path / "data"} | change))  # type: ignore[arg-type]
    for change in (dict(append_eod=False), dict(text_key="id"), dict(vocab_size=5000), dict(max_document_mib=1)):
        with pytest.raises(UserError, match="exists already"):
            run(plain[0], folder, plain[1], **change)


def test_overwrite_and_changed_plan(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    run(path, tokenizer_dirs["olmo2"], tmp_path / "data")
    first = our_files(tmp_path / "data")
    write_jsonl(path, ["three"])
    run(path, tokenizer_dirs["olmo2"], tmp_path / "data", overwrite=True)
    assert our_files(tmp_path / "data") != first
    with pytest.raises(UserError, match=r"--eod-token .* goes with --append-eod"):
        run(path, tokenizer_dirs["olmo2"], tmp_path / "new", append_eod=False, eod_token=EOD)


def test_a_changed_command_is_refused_where_tokens_were_made(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    inputs, olmo2 = tmp_path / "in", tokenizer_dirs["olmo2"]
    inputs.mkdir()
    write_jsonl(inputs / "a.jsonl", ["one", "two"])
    (inputs / "b.jsonl").write_text("bad\n")
    with pytest.raises(UserError, match="max-bad"):
        run(inputs, olmo2, tmp_path / "new", max_bad=0)
    for change in (dict(append_eod=False), dict(folder=tokenizer_dirs["gpt2"]), dict(text_key="id")):
        with pytest.raises(UserError, match="belongs to an unfinished run of another kind"):
            run(**({"inputs": inputs, "folder": olmo2, "output": tmp_path / "new"} | change))  # type: ignore[arg-type]
    (inputs / "b.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="the input files or their division differ"):
        run(inputs, olmo2, tmp_path / "new")


def test_a_mistake_that_made_no_token_is_not_in_the_way(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    path, output, olmo2 = tmp_path / "in.jsonl", tmp_path / "new", tokenizer_dirs["olmo2"]
    path.write_text("\n\n")
    for change, said in ((dict(), "no token to write"), (dict(vocab_size=7), "--vocab-size 7 is smaller")):
        with pytest.raises(UserError, match=said):
            run(path, olmo2, output, **change)
        assert [one.name for one in tmp_path.glob("new*")] == []
    write_jsonl(path, ["one"])
    with pytest.raises(UserError, match="--max-bad allows 0"):
        run(path, olmo2, output, text_key="tekst", max_bad=0)
    # A run that was killed before its first token, with another plan.
    parts = tmp_path / "new.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"tasks": []}')
    (parts / "all.bin").touch()
    assert run(path, olmo2, output).num_documents == 1
    assert not parts.exists()


def test_vocabulary_of_the_model_decides_the_dtype(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]
) -> None:
    manifest = run(plain[0], tokenizer_dirs["olmo2"], tmp_path / "data", vocab_size=100352)
    assert (manifest.dtype, manifest.vocab_size) == ("int32", 100352)
    assert np.array_equal(open_index(tmp_path / "data").tokens, open_index(plain[1]).tokens)


def test_without_eod(
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    reference_ids: dict[str, list[np.ndarray]],
    plain: tuple[Path, Path],
) -> None:
    manifest = run(plain[0], tokenizer_dirs["olmo2"], tmp_path / "data", append_eod=False)
    assert manifest.eod_id is None
    expected = np.concatenate([ids[:-1] for ids in reference_ids["olmo2"]])
    assert np.array_equal(open_index(tmp_path / "data").tokens, expected)


def test_random_line_lengths_with_many_cuts(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Every document is numbered, so that a lost, doubled or moved one shows."""
    generator = random.Random(5)
    lines = io.BytesIO()
    for number in range(150):
        lines.write(json.dumps({"text": f"{number} " + "x" * generator.randint(0, 60)}).encode() + b"\n")
    (tmp_path / "in.jsonl").write_bytes(lines.getvalue())
    tokenizer = Tokenizer.from_file(str(tokenizer_dirs["gpt2"] / "tokenizer.json"))
    for task_bytes in (50, 64):
        output = tmp_path / f"data{task_bytes}"
        run(tmp_path / "in.jsonl", tokenizer_dirs["gpt2"], output, task_bytes=task_bytes)
        data = open_index(output)
        numbers = [int(tokenizer.decode(data.document(n)[:-1]).split()[0]) for n in range(data.num_documents)]
        assert numbers == list(range(150))


def test_special_tokens_in_text_are_those_tokens(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    """As in the Hugging Face tokenizer: EOD written in a text becomes EOD."""
    path = write_jsonl(tmp_path / "in.jsonl", [f"a{EOD}b"])
    run(path, tokenizer_dirs["olmo2"], tmp_path / "data")
    assert np.count_nonzero(open_index(tmp_path / "data").tokens == 0) == 2


def test_job_array_template(tmp_path: Path, tokenizer_dirs: dict[str, Path], plain: tuple[Path, Path]) -> None:
    """slurm/tokenize.sbatch as two array tasks and a merge, with the variables that SLURM sets; then once more."""
    root = Path(__file__).parents[2]
    lines = plain[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(b"".join(lines[150 * number : 150 * (number + 1) or None]))
    (tmp_path / "in" / "2.jsonl").write_bytes(b"".join(lines[300:]))
    (tmp_path / "remit").write_text(f'#!/bin/sh\ncd "{root}" && exec "{sys.executable}" -m data_prep.cli "$@"\n')
    (tmp_path / "remit").chmod(0o755)
    variables = {"INPUT": f"{tmp_path}/in/*.jsonl", "TOKENIZER": str(tokenizer_dirs["olmo2"])}
    variables |= {"OUTPUT": f"{tmp_path}/data", "REMIT": f"{tmp_path}/remit", "SLURM_CPUS_PER_TASK": "1"}

    def submit(**more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(root / "slurm" / "tokenize.sbatch")]
        return subprocess.run(command, env=os.environ | variables | more, capture_output=True, text=True)

    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
    for task in ("0", "1", "1"):
        done = submit(SLURM_ARRAY_TASK_ID=task, **array)
        assert done.returncode == 0, done.stderr
    assert "sound" in done.stdout
    done = submit(MERGE="2")
    assert done.returncode == 0, done.stderr
    assert our_files(tmp_path / "data") == our_files(plain[1])
    assert submit(SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_MAX="2").returncode == 2
