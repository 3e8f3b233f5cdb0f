"""Tokenizing speed and memory: `remit data tokenize`, a Pool like Megatron's, and the bare tokenizer libraries.

    python -m benchmarks.tokenize --output benchmarks/results/tokenize.json

Every provider runs in a process of its own, in turns, on the same documents with the same tokenizer. Rates are tokens a
CPU-second (user and system time of the process and its workers, imports excluded) and tokens a second of wall clock.
The slow providers get the first documents only. Fails where one gives other ids than `tokenizers`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EOD = "<|endoftext|>"
PROVIDERS = {
    "remit, 1 worker": ("remit", 1, "full"),
    "remit, 2 workers": ("remit", 2, "full"),
    "gigatoken in memory": ("gigatoken", 1, "full"),
    "gigatoken in memory, 2 processes": ("gigatoken", 2, "full"),
    "Pool, 1 worker": ("pool", 1, "part"),
    "Pool, 2 workers": ("pool", 2, "part"),
    "tokenizers in memory": ("tokenizers", 1, "part"),
    "remit, tokenizers backend": ("remit-tokenizers", 1, "part"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/remit-benchmark"), help="corpus and tokenizer, kept")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--part-megabytes", type=int, default=8, help="for the slow providers")
    parser.add_argument("--vocab-size", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.provider:
        print(json.dumps(run_provider(arguments.provider, arguments.folder)))
        return
    corpus = prepare(arguments)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for name in PROVIDERS:
            rounds.append({"round": number, "provider": name, **in_process(name, arguments.folder)})
            print(f"{number} {name}: {rounds[-1]['mtok_per_cpu_s']:.2f} Mtok a CPU-second", file=sys.stderr, flush=True)
    report = {"machine": machine(), "corpus": corpus, "rounds": rounds, **summary(rounds)}
    text = json.dumps(report, indent=1) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the corpus, its first part and the tokenizer where they are missing. Returns what they are."""
    folder, record = arguments.folder, arguments.folder / "corpus.json"
    settings = {name: getattr(arguments, name) for name in ("megabytes", "part_megabytes", "vocab_size")}
    if record.exists() and (found := json.loads(record.read_text()))["settings"] == settings:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(source_texts())
    unique = sum(len(text.encode()) for text in texts)
    count = write_corpus(folder / "full.jsonl", texts, arguments.megabytes * 1_000_000)
    write_corpus(folder / "part.jsonl", texts, arguments.part_megabytes * 1_000_000)
    train_tokenizer(texts, arguments.vocab_size).save(str(folder / "tokenizer.json"))
    found = {"settings": settings, "documents": count, "unique_mb": round(unique / 1e6, 1),
             "what": "source and text files of the installed Python packages, one document a file"}  # fmt: skip
    record.write_text(json.dumps(found))
    return found


def source_texts() -> Iterator[str]:
    """Text files of this Python installation in a fixed random order."""
    prefixes = {Path(sys.prefix), Path(os.__file__).parent}
    files = sorted({f for p in prefixes for end in ("py", "md", "rst", "txt", "pyi") for f in p.rglob(f"*.{end}")})
    random.Random(0).shuffle(files)
    for file in files:
        if not 200 <= file.stat().st_size <= 400_000:
            continue
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def write_corpus(path: Path, texts: list[str], size: int) -> int:
    """Write documents up to `size` bytes of JSON lines, over and over where the texts end. Returns their number."""
    written = count = 0
    with open(path, "wb") as out:
        while written < size:
            line = json.dumps({"id": count, "text": texts[count % len(texts)]}, ensure_ascii=False).encode() + b"\n"
            written += out.write(line)
            count += 1
    return count


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[: len(texts) // 3], trainer)
    return tokenizer


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """Run one provider in a process of its own and watch the memory of it and its workers."""
    import psutil

    command = [sys.executable, "-m", "benchmarks.tokenize", "--provider", name, "--folder", str(folder)]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    peaks: dict[int, int] = {}

    def watch() -> None:
        while child.poll() is None:
            try:
                parent = psutil.Process(child.pid)
                for process in (parent, *parent.children(recursive=True)):
                    peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)
            except psutil.Error:
                continue
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = child.communicate()[0]
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{name} failed with {child.returncode}")
    result = json.loads(output.splitlines()[-1])
    return {**result, "peak_rss_mib": round(max(peaks.values()) / 2**20), "processes": len(peaks)}


def run_provider(name: str, folder: Path) -> dict[str, Any]:
    kind, workers, share = PROVIDERS[name]
    path = folder / f"{share}.jsonl"
    run = {"remit": run_remit, "remit-tokenizers": run_remit_fallback, "pool": run_pool,
           "gigatoken": run_gigatoken, "tokenizers": run_tokenizers}[kind]  # fmt: skip
    result = run(path, folder, workers)
    return {
        **result,
        "mtok_per_cpu_s": result["tokens"] / result["cpu_s"] / 1e6,
        "mtok_per_s": result["tokens"] / result["wall_s"] / 1e6,
        "mb_per_s": path.stat().st_size / result["wall_s"] / 1e6,
    }


class Clock:
    """Wall and CPU seconds of this process and of the workers that ended meanwhile."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def read(self, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "wall_s": time.perf_counter() - self.wall, "cpu_s": self._cpu() - self.cpu}


def run_remit(path: Path, folder: Path, workers: int, backend: str = "gigatoken") -> dict[str, Any]:
    """From the file on disk to a published dataset, checks and checksums included."""
    import data_prep.worker  # noqa: F401 - imports are not timed
    from data_prep.tokenize import TokenizeSettings, tokenize

    settings = TokenizeSettings(
        inputs=[str(path)], tokenizer=str(folder), output=str(folder / f"out-{workers}"), workers=workers,
        append_eod=True, eod_token=EOD, backend=backend, overwrite=True,
    )  # fmt: skip
    clock = Clock()
    manifest = tokenize(settings)
    return clock.read(manifest.num_tokens - manifest.num_documents)


def run_remit_fallback(path: Path, folder: Path, workers: int) -> dict[str, Any]:
    return run_remit(path, folder, workers, backend="tokenizers")


def read_texts(path: Path) -> list[str]:
    import orjson

    with open(path, "rb") as file:
        return [orjson.loads(line)["text"] for line in file]


def run_gigatoken(path: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Encoding alone: texts are in memory already, ids stay there."""
    import awkward
    import gigatoken

    tokenizer, texts = gigatoken.Tokenizer(str(folder / "tokenizer.json")), read_texts(path)
    if workers == 1:
        clock = Clock()
        return clock.read(int(awkward.count(tokenizer.encode_batch(texts, parallel=False))))
    clock = Clock()
    pids, pipes = [], []
    for number in range(workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            count = int(awkward.count(tokenizer.encode_batch(texts[number::workers], parallel=False)))
            os.write(writer, str(count).encode())
            os._exit(0)
        os.close(writer)
        pids.append(pid)
        pipes.append(reader)
    tokens = sum(int(os.read(reader, 100)) for reader in pipes)
    for pid in pids:
        os.waitpid(pid, 0)
    return clock.read(tokens)


def run_tokenizers(path: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Encoding alone, in batches of 1,000, which is its fastest call."""
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(str(folder / "tokenizer.json")), read_texts(path)
    clock, tokens = Clock(), 0
    for start in range(0, len(texts), 1000):
        encodings = tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return clock.read(tokens)


_pool_tokenizer: Any = None


def _pool_start(folder: str) -> None:
    global _pool_tokenizer
    from tokenizers import Tokenizer

    _pool_tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")


def _pool_encode(line: str) -> list[int]:
    return _pool_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids


def run_pool(path: Path, folder: Path, workers: int) -> dict[str, Any]:
    """As Megatron's preprocess_data.py: the parent reads lines, workers send lists of ids back, the parent writes."""
    import numpy as np

    lengths, tokens = [], 0
    clock = Clock()
    with multiprocessing.get_context("fork").Pool(workers, _pool_start, (str(folder),)) as pool:
        with open(path, encoding="utf-8") as lines, open(folder / "pool.bin", "wb") as out:
            for ids in pool.imap(_pool_encode, lines, 32):
                tokens += len(ids)
                lengths.append(len(ids) + 1)
                out.write(np.array([*ids, 0], dtype=np.uint16).tobytes(order="C"))
        pool.close()
        pool.join()
    return clock.read(tokens)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each provider, and the ratios that matter."""
    medians: dict[str, dict[str, float]] = {}
    for name, (_, _, share) in PROVIDERS.items():
        of = [r for r in rounds if r["provider"] == name]
        medians[name] = {
            key: round(statistics.median(r[key] for r in of), 3) for key in ("mtok_per_cpu_s", "mtok_per_s", "mb_per_s")
        } | {"peak_rss_mib": max(r["peak_rss_mib"] for r in of)}
        tokens = {r["tokens"] for r in rounds if PROVIDERS[r["provider"]][2] == share}
        if len(tokens) != 1:
            raise SystemExit(f"providers disagree on the number of tokens: {sorted(tokens)}")

    def ratio(one: str, other: str, key: str) -> float:
        return round(medians[one][key] / medians[other][key], 2)

    return {
        "medians": medians,
        "ratios": {
            "remit to Pool, a CPU-second, 1 worker": ratio("remit, 1 worker", "Pool, 1 worker", "mtok_per_cpu_s"),
            "remit to Pool, wall, 2 workers": ratio("remit, 2 workers", "Pool, 2 workers", "mtok_per_s"),
            "remit to gigatoken, a CPU-second, 1 worker": ratio(
                "remit, 1 worker", "gigatoken in memory", "mtok_per_cpu_s"
            ),
            "remit to gigatoken, wall, 2 workers": ratio(
                "remit, 2 workers", "gigatoken in memory, 2 processes", "mtok_per_s"
            ),
            "remit to tokenizers with that backend": ratio(
                "remit, tokenizers backend", "tokenizers in memory", "mtok_per_cpu_s"
            ),
        },
    }


def machine() -> dict[str, Any]:
    import gigatoken  # noqa: F401
    import tokenizers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "load": os.getloadavg(), "tokenizers": tokenizers.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
