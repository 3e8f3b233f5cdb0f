"""Tokenizers, documents and a reference dataset that other tests compare with."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.backends import HOSTILE_TEXTS
from data_prep.tokenize import TokenizeSettings, tokenize
from remit_megatron.data.manifest import Manifest
from tests.data_prep.tokenizers import KINDS, TEXTS, eod_token, save


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Ordinary and hostile texts in a fixed random order, none empty."""
    generator = random.Random(0)
    alphabet = [chr(c) for c in range(1, 0x30000) if not 0xD800 <= c < 0xE000]
    ordinary = ["".join(generator.choices(TEXTS, k=generator.randint(1, 12))) for _ in range(300)]
    strange = ["".join(generator.choices(alphabet, k=200)) for _ in range(40)]
    pieces = [
        *TEXTS,
        " ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u0301",
        "\ufeff",
        "\0",
        "'s",
        "'LL",
        "12",
        "<|endoftext|>",
        "</s>",
    ]
    mixed = ["".join(generator.choices(pieces, k=30)) for _ in range(60)]
    everything = [text for text in [*ordinary, *strange, *mixed, *HOSTILE_TEXTS] if text]
    generator.shuffle(everything)
    return everything


@pytest.fixture(scope="session")
def write_jsonl(documents: list[str]) -> Callable[..., Path]:
    def write(path: Path, texts: list[str] | None = None, *, ascii_only: bool = False) -> Path:
        texts = documents if texts is None else texts
        lines = [json.dumps({"id": n, "text": text}, ensure_ascii=ascii_only) for n, text in enumerate(texts)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        return path

    return write


@pytest.fixture(scope="session")
def reference_ids(tokenizer_dirs: dict[str, Path], documents: list[str]) -> dict[str, list[np.ndarray]]:
    """Ids of every document by the Hugging Face tokenizer, one document at a time, each with its EOD."""
    found = {}
    for kind, folder in tokenizer_dirs.items():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        eod = tokenizer.token_to_id(eod_token(kind))
        found[kind] = [np.array([*tokenizer.encode(text, add_special_tokens=False).ids, eod]) for text in documents]
    return found


def megatron_files(prefix: Path, documents: list[np.ndarray], vocab_size: int) -> tuple[bytes, bytes]:
    """(.bin, .idx) as Megatron-Core's builder writes them, document by document."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def our_files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> tuple[Path, Path]:
    """(the corpus as JSON lines, the dataset made of it in one piece by one worker)."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_jsonl(folder / "in.jsonl")
    run(path, tokenizer_dirs["olmo2"], folder / "data")
    return path, folder / "data"


def run(inputs: list[Path] | Path, folder: Path, output: Path, **settings: object) -> Manifest:
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    defaults: dict[str, object] = {"workers": 1, "append_eod": True}
    return tokenize(
        TokenizeSettings(inputs=names, tokenizer=str(folder), output=str(output), **(defaults | settings))  # type: ignore[arg-type]
    )
