"""The choice of backend, the check while it works, and documents of any size."""

import dataclasses
import json
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep import backends, worker
from data_prep.backends import (
    HOSTILE_TEXTS,
    Choice,
    Gigatoken,
    HuggingFace,
    TokenizerFile,
    choose_backend,
    first_difference,
)
from data_prep.cuts import pieces, safe_to_cut
from data_prep.tokenize import TokenizeSettings, tokenize
from remit_megatron.data.indexed import open_index
from remit_megatron.errors import RunError
from tests.data_prep.tokenizers import KINDS, TEXTS

ROOT = Path(__file__).parents[2]
BLOCK = "def f(x):\n    return 'caf\u00e9 \U0001f600' + str(x) * 12"


@pytest.mark.parametrize("kind", KINDS)
def test_choice(kind: str, tokenizer_dirs: dict[str, Path]) -> None:
    file = TokenizerFile.load(tokenizer_dirs[kind])
    choice = choose_backend("auto", file, ["hello"])
    assert choice.backend == {"youtu": "tokenizers", "nfc": "tokenizers"}.get(kind, "gigatoken")
    assert {"youtu": "cannot load", "nfc": "differs from tokenizers on"}.get(kind, "equal to tokenizers") in choice.why
    assert choose_backend("tokenizers", file, []) == Choice("tokenizers", "asked for")


@pytest.mark.parametrize("kind", ["gpt2", "olmo2", "smollm3", "sentencepiece"])
def test_million_spaces_and_letters(kind: str, tokenizer_dirs: dict[str, Path]) -> None:
    file = TokenizerFile.load(tokenizer_dirs[kind])
    text = " " * 1_000_000 + "x" + "\n" * 50_000 + "a" * 50_000
    for backend in (Gigatoken(file), HuggingFace(file)):
        got, lengths = backend.encode([text, text.encode(), ""])
        assert lengths.tolist() == [len(got) // 2, len(got) // 2, 0]
        if backend.name == "gigatoken":
            expected = got
    assert np.array_equal(got, expected)


class Wrong:
    """A backend that errs on one word."""

    name, version = "gigatoken", "wrong"

    def __init__(self, right: Gigatoken) -> None:
        self.right = right

    def encode(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self.right.encode(texts)
        wrong = [b"zebra" in (text.encode() if isinstance(text, str) else text) for text in texts]
        return ids + np.repeat(wrong, lengths), lengths


def test_mismatch_in_the_sample_is_refused(tokenizer_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file, right = TokenizerFile.load(tokenizer_dirs["olmo2"]), Gigatoken
    assert first_difference(file, [*TEXTS, "a zebra"]) is None
    monkeypatch.setattr(backends, "Gigatoken", lambda file: Wrong(right(file)))
    assert first_difference(file, ["a zebra"]) is not None
    choice = choose_backend("auto", file, ["zebra crossing"] * 3)
    assert choice.backend == "tokenizers"
    assert "differs from tokenizers on 'zebra crossing' at token 0" in choice.why


@pytest.mark.parametrize("every", [1, 7])
def test_mismatch_while_running_is_refused(
    every: int,
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A document past the sample that was compared at start: the check in the worker finds it."""
    path = write_jsonl(tmp_path / "in.jsonl", ["fine"] * 2100 + ["zebra"] * 10)
    right = backends.Gigatoken
    monkeypatch.setattr(worker, "CHECK_EVERY", every)
    monkeypatch.setattr(worker, "open_backend", lambda name, file: Wrong(right(file)))
    with pytest.raises(RunError, match=r"differs from tokenizers on 'zebra'.*--backend tokenizers"):
        tokenize(
            TokenizeSettings(
                inputs=[str(path)], tokenizer=str(tokenizer_dirs["olmo2"]), output=str(tmp_path / "data"), workers=1,
                task_bytes=50_000,
            )
        )  # fmt: skip


def test_check_counts_documents_across_batches(
    tokenizer_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CHECK_EVERY", 10)
    file = TokenizerFile.load(tokenizer_dirs["gpt2"])
    job = worker.Job(Path(), file, "gigatoken", file.vocab_size, 0, "text", 1 << 20, 0)
    encoder = worker.Encoder(job)
    assert encoder.reference is not None
    seen: list[str | bytes] = []
    encode = encoder.reference.encode
    monkeypatch.setattr(encoder.reference, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    numbers = iter(range(100))
    for size in (3, 1, 25, 4, 7, 60):
        encoder.encode([str(next(numbers)) for _ in range(size)])
    assert seen == [str(n) for n in range(0, 100, 10)]


def long_document(seed: int) -> str:
    """Words, code and hostile text with newlines of all kinds between."""
    generator = random.Random(seed)
    between = ["\n", "\n\n", " \n", "\r\n", "\n  ", " ", ".\n", "x\n"]
    parts = generator.choices([*TEXTS, *(text[:300] for text in HOSTILE_TEXTS), "def f", "The end.", "a1"], k=400)
    return "".join(part + generator.choice(between) for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_document_give_its_ids(kind: str, tokenizer_dirs: dict[str, Path]) -> None:
    """Cut wherever a document may be, in pieces far smaller than in use. SentencePiece puts a space before a text."""
    file = TokenizerFile.load(tokenizer_dirs[kind])
    backend = HuggingFace(file)
    assert safe_to_cut(file, backend) == (kind != "sentencepiece")
    for seed in range(3):
        text = long_document(seed)
        cut = list(pieces(text.encode(), 50))
        assert b"".join(cut).decode() == text
        assert len(cut) > 25
        whole, _ = backend.encode([text])
        apart, _ = backend.encode(cut)
        assert np.array_equal(whole, apart) == (kind != "sentencepiece")


def test_unsafe_patterns_are_not_cut(tokenizer_dirs: dict[str, Path]) -> None:
    """A split that looks behind, and one that keeps a newline with the word after it, which trial shows."""
    file = TokenizerFile.load(tokenizer_dirs["olmo2"])
    for pattern in (r"(?<=a)b|\s+|\S+", r"^\s+|\S+|\s+", r"\n\w+|\S+|\s+", r"\w+ \w+|\S+|\s+"):
        content = json.loads(file.content)
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        for space in ("\u010a", "\u0120"):
            content["model"]["vocab"][f"{space}a"] = 5000 + ord(space)
            content["model"]["merges"].append([space, "a"])
        other = dataclasses.replace(file, content=json.dumps(content))
        assert not safe_to_cut(other, HuggingFace(other))


SCRIPT = """
import sys
from data_prep.tokenize import TokenizeSettings, tokenize
inputs, folder, output = sys.argv[1:]
tokenize(TokenizeSettings(inputs=[inputs], tokenizer=folder, output=output, workers=1, append_eod=True))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_tokenizer_files_of_older_versions(tokenizer_dirs: dict[str, Path]) -> None:
    """They lack `use_regex`, which is on then; tokens that take the space after them forbid to cut before one."""
    file = TokenizerFile.load(tokenizer_dirs["gpt2"])
    content = json.loads(file.content)
    del content["pre_tokenizer"]["use_regex"]
    older = dataclasses.replace(file, content=json.dumps(content))
    assert safe_to_cut(older, HuggingFace(older))
    content["added_tokens"][0]["rstrip"] = True
    greedy = dataclasses.replace(file, content=json.dumps(content))
    whole, _ = HuggingFace(greedy).encode(["<|endoftext|> a"])
    apart, _ = HuggingFace(greedy).encode(["<|endoftext|>", " a"])
    assert not np.array_equal(whole, apart)
    assert not safe_to_cut(greedy, HuggingFace(greedy))


def repeated_ids(file: TokenizerFile, block: str, repeats: int) -> np.ndarray:
    """Ids of a block over and over, from what one more of them adds, which is seen to add the same again.

    The Hugging Face tokenizer itself needs gigabytes and minutes for 50 MB.
    """
    two, three, seven = (HuggingFace(file).encode([block * count])[0] for count in (2, 3, 7))
    same = int(np.argmin(np.append(two == three[: len(two)], False)))
    more = three[same : same + len(three) - len(two)]

    def ids(count: int) -> np.ndarray:
        return np.concatenate([two[:same], np.tile(more, count - 2), two[same:]])

    assert np.array_equal(ids(3), three)
    assert np.array_equal(ids(7), seven)
    return ids(repeats)


@pytest.mark.parametrize(
    ("kind", "ascii_only", "end"),
    [
        ("olmo2", False, "\n"),
        pytest.param("olmo2", True, "\n\n", marks=pytest.mark.slow),
        pytest.param("olmo2", False, "\u3002", marks=pytest.mark.slow),
        pytest.param("gpt2", False, "\r\n", marks=pytest.mark.slow),
        pytest.param("smollm3", True, " ", marks=pytest.mark.slow),
        pytest.param("sentencepiece", False, "\n", marks=pytest.mark.slow),
        pytest.param("youtu", False, "\n", marks=pytest.mark.slow),
    ],
)
def test_50_mb_document(kind: str, ascii_only: bool, end: str, tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """Every id is the tokenizer's, and memory stays low, whether gigatoken works or `tokenizers`."""
    file, block = TokenizerFile.load(tokenizer_dirs[kind]), BLOCK + end
    repeats = 50_000_000 // len(block.encode())
    with open(tmp_path / "in.jsonl", "w", encoding="utf-8") as out:
        for body in ("small", block * repeats, "last"):
            out.write(json.dumps({"text": body}, ensure_ascii=ascii_only) + "\n")
    arguments = [str(tmp_path / "in.jsonl"), str(tokenizer_dirs[kind]), str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = open_index(tmp_path / "data")
    assert data.num_documents == 3
    assert np.array_equal(data.document(1)[:-1], repeated_ids(file, block, repeats))
    peak_mib = int(done.stdout.splitlines()[-1]) / 1024
    assert peak_mib < 400, f"{peak_mib:.0f} MiB at peak"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json array", "parquet", "zst"])
def test_memory_of_large_inputs(kind: str, tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    """A row group of 600 MB, an array of 64 MiB, a compressed GB: none of it is in memory at once."""
    texts = [f"{number} " + BLOCK * 200 for number in range(4200)]  # 60 MB
    path = tmp_path / {"json array": "in.json", "parquet": "in.parquet", "zst": "in.jsonl.zst"}[kind]
    if kind == "json array":
        path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        table = pyarrow.table({"text": texts * 10})
        pyarrow.parquet.write_table(table, path, row_group_size=len(table), use_dictionary=False)
        del table
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        with open(path, "wb") as out, zstandard.ZstdCompressor().stream_writer(out) as stream:
            for _ in range(15):
                stream.write(lines)
    arguments = [str(path), str(tokenizer_dirs["olmo2"]), str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak_mib = int(done.stdout.splitlines()[-1]) / 1024
    # The array is there as text and as objects at once; what the allocator keeps of either varies by 50 MiB.
    assert peak_mib < {"json array": 450}.get(kind, 400), f"{peak_mib:.0f} MiB at peak"


def test_whole_documents_have_a_lower_limit(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`tokenizers` needs 100 bytes for each byte of a document that it may not cut."""
    content = json.loads((tokenizer_dirs["sentencepiece"] / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False  # gigatoken cannot load that
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "word " * 500_000}) + '\n{"text": "short"}\n')
    settings = TokenizeSettings(
        inputs=[str(tmp_path / "in.jsonl")], tokenizer=str(tmp_path), output=str(tmp_path / "data"), workers=1
    )
    manifest = tokenize(settings)
    assert (manifest.num_documents, manifest.provenance["bad"]) == (1, 1)
    said = capsys.readouterr().err
    assert "3 pieces: gigatoken cannot load" in said
    assert "documents above 2 MiB are put aside, because it takes them whole: --max-document-mib" in said
    assert "longer than 2,097,152 bytes" in (tmp_path / "data.bad.jsonl").read_text()
    whole = tokenize(dataclasses.replace(settings, max_document_mib=3, overwrite=True))
    assert (whole.num_documents, whole.provenance["bad"]) == (2, 0)


@pytest.mark.slow
def test_workers_do_without_torch() -> None:
    """Importing torch would cost every worker 2 s and 200 MB."""
    code = "import sys, data_prep.cli, data_prep.worker, data_prep.tokenize; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cache_of_words_is_bounded(tokenizer_dirs: dict[str, Path]) -> None:
    """gigatoken keeps every word it has seen; it begins anew, with the same ids, when that has taken enough memory."""
    # In a process of its own: where others have freed memory, a cache grows without the process growing.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        begins, equal = pool.submit(encode_with_a_bound, tokenizer_dirs["olmo2"]).result()
    assert begins
    assert equal


def encode_with_a_bound(tokenizer: Path) -> tuple[int, bool]:
    """(how often the tokenizer began anew, whether its ids are those of one that never did)."""
    backends.CACHE_BYTES, backends.LOOK_BYTES = 1 << 20, 1 << 18  # type: ignore[misc]
    file = TokenizerFile.load(tokenizer)
    bounded, whole, begins = Gigatoken(file), Gigatoken(file), []
    begin = bounded._begin
    bounded._begin = lambda: (begins.append(1), begin())  # type: ignore[method-assign, assignment, return-value]
    whole._bound_cache = lambda texts: None  # type: ignore[method-assign]
    generator = random.Random(0)
    texts = [" ".join("".join(generator.choices("abcdefgh", k=9)) for _ in range(200)) for _ in range(3000)]
    ids = [bounded.encode(texts[start : start + 50])[0] for start in range(0, len(texts), 50)]
    return len(begins), np.array_equal(np.concatenate(ids), whole.encode(texts)[0])


def with_spaces_before_rare_characters(folder: Path, output: Path) -> Path:
    """The tokenizer with a merge of a space and the first byte of four, as large vocabularies have it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    byte = "\u00f0"  # as ByteLevel writes F0
    content["model"]["vocab"]["\u0120" + byte] = max(content["model"]["vocab"].values()) + 1
    content["model"]["merges"].append(["\u0120", byte])
    output.mkdir()
    (output / "tokenizer.json").write_text(json.dumps(content))
    return output


def test_characters_on_which_the_libraries_differ(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    """Digits that only a newer Unicode knows, after a space: their documents get the ids of `tokenizers`."""
    folder = with_spaces_before_rare_characters(tokenizer_dirs["olmo2"], tmp_path / "tokenizer")
    file = TokenizerFile.load(folder)
    choice = choose_backend("auto", file, ["hello"])
    if not choice.exact:
        pytest.skip("these versions of gigatoken and tokenizers know the same Unicode")
    assert choice.backend == "gigatoken"
    assert len(choice.exact) < 1000
    texts = ["plain words", *(f"a {c} b" for c in choice.exact), "caf\u00e9", *(f"1 {c}{c}" for c in choice.exact)]
    fast, right = Gigatoken(file), HuggingFace(file)
    assert not np.array_equal(fast.encode(texts)[0], right.encode(texts)[0]), "they differ, or nothing is shown"
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    manifest = tokenize(
        TokenizeSettings(inputs=[str(path)], tokenizer=str(folder), output=str(tmp_path / "data"), workers=1)
    )
    assert manifest.provenance["backend"].startswith("gigatoken")
    assert np.array_equal(open_index(tmp_path / "data").tokens, right.encode(texts)[0])
    holds = backends.holder(choice.exact)
    for text in (*texts, "", "plain"):
        assert holds(text) == holds(text.encode()) == any(c in text for c in choice.exact)
