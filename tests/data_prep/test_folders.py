"""Nothing in a folder is left out without a word: one of each kind of entry, in every place that looks for files."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import zstandard

from data_prep import folders
from data_prep.folders import CARD, count_left_out, describe, walk
from data_prep.inputs import SMALLEST_TASK_BYTES, TASK_BYTES, Input, expand_inputs, task_size
from data_prep.tokenize import TokenizeSettings, tokenize
from remit_megatron.errors import UserError


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A folder with one of each: read, linked, hidden, unknown, special, ours, a card."""
    folder, elsewhere = tmp_path / "mixture", tmp_path / "elsewhere"
    for path in (folder / "code", folder / ".cache", folder / "old.parts", elsewhere / "wiki"):
        path.mkdir(parents=True)
    (folder / "code" / "a.jsonl").write_bytes(line("code"))
    (elsewhere / "wiki" / "b.jsonl.zstd").write_bytes(zstandard.compress(line("wiki")))
    (folder / "wiki").symlink_to(elsewhere / "wiki")
    (elsewhere / "wiki" / "up").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "c.jsonl.xz").write_bytes(b"x")
    (folder / "d.csv").write_bytes(b"x")
    (folder / ".cache" / "e.jsonl").write_bytes(line("hidden"))
    (folder / "README.md").write_text("# A card")
    (folder / "LICENSE").write_text("text")
    (folder / "old.parts" / "f.jsonl").write_bytes(line("ours"))
    for ending in (".bin", ".idx", ".manifest.json", ".bad.jsonl"):
        (folder / f"tokens{ending}").write_bytes(b"x")
    return folder


KINDS = {
    folders.UNKNOWN: {"c.jsonl.xz", "d.csv"},
    folders.NOWHERE: {"gone.jsonl"},
    folders.SPECIAL: {"pipe.jsonl"},
    folders.HIDDEN: {".cache"},
    folders.CARD: {"README.md", "LICENSE"},
    folders.OURS: {"old.parts", "tokens.bin", "tokens.idx", "tokens.manifest.json", "tokens.bad.jsonl"},
    folders.AGAIN: {"up"},
}


def test_every_entry_is_read_or_has_a_reason(mixture: Path) -> None:
    found = walk(mixture)
    assert {entry.path.name for entry in found if entry.left_out is None} == {"a.jsonl", "b.jsonl.zstd"}
    assert {why: {e.path.name for e in found if e.left_out == why} for why in KINDS} == KINDS
    assert len(found) == 2 + sum(map(len, KINDS.values()))


def test_what_may_be_text_needs_the_users_word(
    mixture: Path, tmp_path: Path, tokenizer_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder and a glob alike; with that word every file is counted, on the screen and in the manifest."""
    said = r"4 files would be left out: \S+c.jsonl.xz \(of an ending that is not read\), \S+d.csv .*--skip-unknown"
    for name in (str(mixture), f"{mixture.parent}/mix*"):
        with pytest.raises(UserError, match=said):
            expand_inputs([name])
    settings = TokenizeSettings(
        inputs=[str(mixture)], tokenizer=str(tokenizer_dirs["gpt2"]), output=str(tmp_path / "data"), workers=1,
        skip_unknown=True,
    )  # fmt: skip
    manifest = tokenize(settings)
    counts = {why: len(names) for why, names in KINDS.items()}
    assert manifest.num_documents == manifest.provenance["files_read"] == 2
    assert manifest.provenance["left_out"] == {why: counts[why] for why in sorted(folders.OF_THE_CORPUS)}
    report = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("files: "))
    assert report.startswith("files: 15 seen, 2 read, 13 left out: ")
    for why, names in KINDS.items():
        assert f"{len(names)} {why} (" in report
    assert "c.jsonl.xz" in report


def test_links_that_count_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_bytes(line("x"))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"b: the same folder as \S+a; its documents would count twice"):
        walk(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a" / "x.jsonl")
    with pytest.raises(UserError, match=r"named twice among the inputs \(also as"):
        expand_inputs([str(tmp_path)])


def test_saved_datasets_inside_a_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(str(tmp_path / "in" / "deep" / "saved"))
    (tmp_path / "in" / "a.jsonl").write_bytes(line("x"))
    found = expand_inputs([str(tmp_path / "in")])
    assert [(Path(one.path).name, one.kind) for one in found.inputs] == [("a.jsonl", "jsonl"), ("saved", "arrow")]
    assert found.left_out == []
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]}))
    splits.save_to_disk(str(tmp_path / "in" / "splits"))
    with pytest.raises(UserError, match="several splits; name one of them: train"):
        expand_inputs([str(tmp_path / "in")])


def test_names_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("a" * 256, "File name too long"),
        ("loop", "a link to nothing"),
        ("none*", "no such file, folder or match"),
        ("a\0b", r"a\\x00b: (no such file|cannot be read)"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            expand_inputs([str(tmp_path / name)])
        assert str(caught.value).isprintable()


def test_text_of_another_encoding(tmp_path: Path) -> None:
    """As UTF-16 of ASCII text is valid UTF-8 with a NUL at every second byte, no line of it would be put aside."""
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_bytes("the old house\nstands\n".encode(encoding))
            with pytest.raises(UserError, match=rf"{name}: UTF-16 or UTF-32, not UTF-8: convert it \(iconv"):
                expand_inputs([str(tmp_path / name)], text_lines=True)
    (tmp_path / "a.txt").write_bytes("\ufeffa\0b \u00e9".encode())
    assert expand_inputs([str(tmp_path / "a.txt")]).inputs[0].kind == "text"


def test_small_inputs_are_cut_for_every_worker() -> None:
    """By the input alone: two starts, and two shards, must cut alike whatever workers they have."""

    def of(*sizes: int) -> int:
        return task_size([Input(str(n), "jsonl", size, 0) for n, size in enumerate(sizes)])

    assert of(13 << 20) == SMALLEST_TASK_BYTES
    assert of(500 << 20, 500 << 20) == (1000 << 20) // 64
    assert of(5 << 30) == TASK_BYTES


def test_report_names_some_of_many() -> None:
    entries = [folders.Entry(Path(f"{n}.csv"), folders.UNKNOWN) for n in range(7)]
    assert describe(9, 2, *count_left_out(entries)) == (
        "files: 9 seen, 2 read, 7 left out: 7 of an ending that is not read (0.csv, 1.csv, 2.csv, 3.csv, 4.csv, ...)"
    )
    assert describe(1, 1, *count_left_out([])) == "files: 1 seen, 1 read, 0 left out"


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own walks leave it out in silence."""
    (tmp_path / "locked").mkdir()
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(folders.os, "listdir", refuse)
    with pytest.raises(UserError, match="locked: the folder cannot be read: Permission denied"):
        walk(tmp_path)
    shutil.rmtree(tmp_path / "locked")
    assert walk(tmp_path) == []


def test_what_programs_leave_beside_a_corpus(tmp_path: Path) -> None:
    """Marks of Spark and lists of checksums describe the others; an archive beside its file would count twice."""
    (tmp_path / "part-0.json").write_text('{"text": "a"}\n')
    for name in ("_SUCCESS", "SHA256SUMS", "_metadata"):
        (tmp_path / name).write_text("")
    reasons = {entry.path.name: entry.left_out for entry in walk(tmp_path)}
    assert reasons == {"part-0.json": None, "_SUCCESS": CARD, "SHA256SUMS": CARD, "_metadata": CARD}
    (tmp_path / "part-0.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"part-0\.json\.gz: lies beside part-0\.json: .* would count twice"):
        walk(tmp_path)


def test_zero_bytes_of_a_crash_are_no_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + bytes(40))
    with pytest.raises(UserError, match="holds a run of zero bytes"):
        expand_inputs([str(path)])
    path.write_bytes('{"text": "a"}\n'.encode("utf-16-le") * 9)
    with pytest.raises(UserError, match="UTF-16"):
        expand_inputs([str(path)])
