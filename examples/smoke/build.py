"""Build the smoke run's data: tokenizer, .bin/.idx datasets with manifests, and held-out problems for exact match."""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.writer import write_dataset
from examples.smoke import arithmetic, corpus
from examples.smoke import tokenizer as smoke_tokenizer
from remit_megatron.data.files import write_atomically
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import RemitError

RECORD = "build.json"
ENCODE_BATCH = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """How much of what. Streams of problems differ by seed; training and held-out streams share no canonical form."""

    seed: int = 1
    code_files: int = 200
    """Training files, at most."""
    statements: int = 8_000
    """Problems in two wordings and without a solution, for the general mix."""
    worked: int = 20_000
    """Problems with solution, for mid-training."""
    solutions: int = 10_000
    """Problems with solution, for the reference."""
    held_out_nll: int = 500
    held_out_exact: int = 250
    vocab_size: int = smoke_tokenizer.VOCAB_SIZE
    tokenizer_code_files: int = 150
    tokenizer_problems: int = 3_000


QUICK = Settings(
    code_files=60,
    statements=250,
    worked=2_000,
    solutions=1_000,
    held_out_nll=100,
    held_out_exact=20,
    tokenizer_code_files=60,
    tokenizer_problems=500,
)


def build(folder: Path, settings: Settings | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make everything under `folder`, unless it is there already, and return the record that build.json holds.

    Datasets (prefixes): code and statements (general mix), worked (arithmetic of the mid-training mix, beside code),
    solutions (the reference's), code_held_out, worked_held_out. Also tokenizer.json and problems_held_out.jsonl with a
    `prompt` and an `answer` a line. The record's key covers the settings, this package's code and the sources read.
    Raises UserError where the standard library's sources are missing.
    """
    settings = settings or Settings()
    train_files, held_out_files = corpus.split_code(corpus.code_files())
    train_files = train_files[: settings.code_files]
    key = _content_key(settings, [*train_files, *held_out_files])
    known = _read_record(folder)
    if known and known["key"] == key and all(_size(folder / name) == size for name, size in known["files"].items()):
        say(f"{folder}: already built ({key[:12]})")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)

    code = [file.text for file in train_files]
    texts = _texts(settings, code, [file.text for file in held_out_files])
    tokenizer_path = folder / "tokenizer.json"
    tokenizer = smoke_tokenizer.train_tokenizer(
        [*code[: settings.tokenizer_code_files], *texts["worked"][: settings.tokenizer_problems]], settings.vocab_size
    )
    write_atomically(tokenizer_path, tokenizer.to_str(pretty=True).encode())
    tokens = {}
    for name, documents in texts.items():
        manifest = write_dataset(
            folder / name,
            encode(tokenizer, documents),
            vocab_size=settings.vocab_size,
            eod_id=tokenizer.token_to_id(smoke_tokenizer.EOD_TOKEN),
            tokenizer_hash=tokenizer_hash(tokenizer_path),
            provenance={"source": "examples.smoke.build", "key": key, "settings": asdict(settings)},
        )
        tokens[name] = manifest.num_tokens
        say(f"{folder / name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    write_atomically(folder / "problems_held_out.jsonl", _jsonl(_held_out(settings)[: settings.held_out_exact]))
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    record = {"key": key, "tokens": tokens, "files": {name: _size(folder / name) for name in names}}
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return record


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each document, batch by batch so that memory holds one batch."""
    stream = iter(documents)
    while batch := list(itertools.islice(stream, ENCODE_BATCH)):
        for encoding in tokenizer.encode_batch(batch):
            yield encoding.ids


def _texts(settings: Settings, code: list[str], held_out_code: list[str]) -> dict[str, list[str]]:
    def take(stream: int, count: int) -> list[arithmetic.Problem]:
        return list(itertools.islice(arithmetic.problems(settings.seed * 1000 + stream, held_out=False), count))

    return {
        "code": code,
        "statements": [problem.statement for problem in take(0, settings.statements)],
        "worked": [problem.document for problem in take(1, settings.worked)],
        "solutions": [problem.document for problem in take(2, settings.solutions)],
        "code_held_out": held_out_code,
        "worked_held_out": [problem.document for problem in _held_out(settings)[settings.held_out_exact :]],
    }


def _held_out(settings: Settings) -> list[arithmetic.Problem]:
    stream = arithmetic.problems(settings.seed * 1000, held_out=True, unique_numbers=True)
    return list(itertools.islice(stream, settings.held_out_exact + settings.held_out_nll))


def _jsonl(problems: list[arithmetic.Problem]) -> bytes:
    lines = [{"prompt": p.prompt, "answer": p.answer, "solution": p.solution, "kind": p.kind} for p in problems]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _content_key(settings: Settings, files: list[corpus.CodeFile]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in (__file__, corpus.__file__, arithmetic.__file__, smoke_tokenizer.__file__):
        digest.update(Path(source).read_bytes())
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    return digest.hexdigest()


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished build, or None; one that cannot be read is as good as none, for it is made anew."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and {"key", "files", "tokens"} <= record.keys() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.smoke.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smoke/data"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a corpus for tests")
    arguments = parser.parse_args()
    try:
        build(arguments.out, QUICK if arguments.quick else Settings())
    except RemitError as error:
        print(f"smoke: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
