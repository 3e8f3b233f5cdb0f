"""The commands that are killed, doubled and started again, each with a small input of its own."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.writer import write_dataset
from remit_megatron import toml
from tests.data_prep.tokenizers import TEXTS, save
from tests.kills.zygote import start
from tests.train.runs import EOD, SAMPLES, SEQUENCE, TIMING, VOCAB

MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": VOCAB,
    "tied_embeddings": False,
}
STEPS = 4


def recipe(run: str, **changes: Any) -> dict[str, Any]:
    """All paths are relative to the folder that a command is started in, so that what it writes does not name it."""
    settings: dict[str, Any] = {
        "run": run,
        "model": dict(MODEL),
        "data": {"sequence_length": SEQUENCE, "train": [{"path": "train"}], "eval": {"held": "held"}},
        "batch": {"global_batch_tokens": SEQUENCE * SAMPLES, "microbatch_samples": 2},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"train_tokens": STEPS * SEQUENCE * SAMPLES, "warmup_tokens": 0},
        "compute": {"device": "cpu", "threads": 1},
        "evaluation": {"every_steps": 2, "samples": 4},
        "checkpoint": {"every_steps": 2, "keep": 1},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def guided(run: str, **changes: Any) -> dict[str, Any]:
    """By the co-located reference `base`."""
    changes["reference"] = {"path": "base", **changes.get("reference", {})}
    return recipe(run, objective={"name": "remit"}, **changes)


RECIPES: dict[str, dict[str, Any]] = {
    "base": recipe("base", checkpoint={"every_steps": STEPS}),
    "train": guided("run", logging={"tokens_every_steps": 2}),
    "async": guided("run", checkpoint={"every_steps": 2, "keep": 1, "asynchronous": True}),
    "ranks": guided("run", parallel={"tensor": 2}),
    "kept": guided("run", reference={"write_scores": "scores"}),
    "other": guided("run", optimizer={"peak_lr": 1e-3}),
    "score": guided("run", reference={"scores": "scores"}),
    "queue": guided("run", reference={"queue": {"ahead_steps": 2, "timeout_s": 60.0, "fallback": "stop"}}),
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def make_world(folder: Path) -> None:
    """Everything that any job starts from, in an empty folder."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("held", 12)):
        ids = [generator.integers(1, VOCAB, length).tolist() for length in generator.integers(5, 60, count)]
        write_dataset(folder / name, ids, vocab_size=VOCAB, eod_id=EOD)
    for name in ("a", "b"):
        ids = [generator.integers(0, 19, length).tolist() for length in generator.integers(1, 40, 30)]
        write_dataset(folder / name, ids, vocab_size=20, eod_id=19, tokenizer_hash="aa")
    for name in ("large", "small"):
        np.save(folder / f"{name}.npy", generator.random(30))
    save("gpt2", folder / "tokenizer")
    texts = ["".join(generator.choice(TEXTS, size=3)) for _ in range(60)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "bad\n")
    for name, settings in RECIPES.items():
        (folder / f"{name}.toml").write_text(toml.dumps(settings))
    (folder / "like").mkdir()
    (folder / "like" / "config.json").write_text(json.dumps(LLAMA))
    for command in (("train", "base.toml"), ("convert", "export", "base", "hf", "--like", "like")):
        process = start(command, folder, folder / ".said")
        assert process.wait() == 0, process.text()
    (folder / "hf" / ".made_of").unlink()
    (folder / ".said").unlink()


DATA = ("train.*", "held.*")
GUIDED = (*DATA, "base")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and how its result is looked at."""

    command: Sequence[str]
    inputs: Sequence[str]
    """Of the world: what it starts from; globs."""
    ranks: int = 1
    beside: Sequence[str] | None = None
    """A command that is started just before, and is not killed. Both end well in the end."""
    prepare: Callable[[], None] = lambda: None
    """Called in its process first."""
    appears: tuple[str, str] | None = None
    """A path, and a glob of files that are all as they will be in the end wherever that path exists."""
    cheap: bool = False
    """Whether it takes well under a second."""


def small_steps() -> None:
    """Many batches, parts and checkpoints in a small corpus, many blocks in few scores."""
    from data_prep import assemble, readers
    from remit_megatron.scores import cache

    readers.BATCH_BYTES, assemble.CHECKPOINT_BYTES, cache.BLOCK_BYTES = 2_000, 4_000, 2 * SEQUENCE * 8


def hanging() -> None:
    """The reference comes to no end; what may take as long as it likes at the start may take a second from there on."""
    from remit_megatron.config import Watchdog as Limits
    from remit_megatron.run import watchdog
    from remit_megatron.scores import follow, score, scorer

    class Impatient(watchdog.Watchdog):
        def _enter(self, step: int | None, phase: str | None) -> None:
            if phase != "the start":
                self.limits = Limits(step_timeout_s=1, slow_timeout_s=1)
            super()._enter(step, phase)

    watchdog.GRACE_S = 0.2
    score.Watchdog = follow.Watchdog = Impatient  # type: ignore[misc]
    scorer.Scorer.score = lambda *_: time.sleep(100)  # type: ignore[assignment, return-value]


def _data(*command: str, inputs: Sequence[str]) -> Job:
    appears = ("out/d.idx", "out/d.*")
    return Job(command=("data", *command), inputs=inputs, prepare=small_steps, appears=appears, cheap=True)


def _train(name: str, **more: Any) -> Job:
    return Job(command=("train", f"{name}.toml"), inputs=(*GUIDED, f"{name}.toml"), prepare=small_steps, **more)


def _score(*more: str) -> Job:
    return Job(command=("score", "score.toml", *more), inputs=(*GUIDED, "score.toml"), prepare=small_steps)


def _convert(action: str, source: str, target: str, *more: str) -> Job:
    command = ("convert", action, source, target, *more)
    return Job(command=command, inputs=("hf", "base", "like"), appears=(target, f"{target}/*"), cheap=True)


FOLLOW, TRAIN = ("score", "queue.toml", "--follow"), ("train", "queue.toml")
JOBS = {
    "tokenize": _data(
        *("tokenize", "in.jsonl", "--tokenizer", "tokenizer", "--output", "out/d", "--append-eod", "--workers", "1"),
        *("--backend", "tokenizers"),
        inputs=("in.jsonl", "tokenizer"),
    ),
    "merge": _data("merge", "a", "b", "--output", "out/d", inputs=("a.*", "b.*")),
    "select": _data(
        *("select", "a", "--large", "large.npy", "--small", "small.npy", "--keep", "0.5", "--output", "out/d"),
        inputs=("a.*", "*.npy"),
    ),
    "import": _convert("import", "hf", "imported"),
    "export": _convert("export", "base", "exported", "--like", "like"),
    "score": _score(),
    "train": _train("train"),
    "train.async": _train("async"),
    "train.ranks": _train("ranks", ranks=2),
    "train.kept": _train("kept"),
    "scorer": Job(command=FOLLOW, inputs=(*GUIDED, "queue.toml"), beside=TRAIN),
    "train.queue": Job(command=TRAIN, inputs=(*GUIDED, "queue.toml"), beside=FOLLOW),
}
OTHERS = {
    "train of another recipe": _train("other"),
    "import, rounded": _convert("import", "hf", "imported", "--dtype", "bf16"),
    "export, rounded": _convert("export", "base", "exported", "--like", "like", "--dtype", "bf16"),
    "score, first half": _score("--shard", "0/2"),
    "score, second half": _score("--shard", "1/2"),
}
"""More commands, for two at once."""
PAIRS = [
    *((name, name) for name in JOBS),
    ("train", "train of another recipe"),
    ("tokenize", "merge"),
    ("merge", "select"),
    ("import", "import, rounded"),
    ("export", "export, rounded"),
    ("score, first half", "score, second half"),
    ("train.kept", "score"),
]
"""Commands that are started within a second of each other."""
CHANGING = (
    "*/status.json",
    "*/log.txt",
    "*/logs/*",
    "*/queue/run.json",
    "*/queue/scorer.json",
    "*.lock",
    "*/.metadata",
)
"""Files whose content is about a start, not about its result."""


def contents(folder: Path) -> dict[str, str]:
    """Every file by its path, and a hash of what must be the same again."""
    return {
        str(path.relative_to(folder)): _digest(path, str(path.relative_to(folder)))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _digest(path: Path, name: str) -> str:
    if any(fnmatch(f"/{name}", f"*{pattern}") for pattern in CHANGING):
        return ""
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        content = json.dumps([{k: v for k, v in line.items() if k not in TIMING} for line in lines]).encode()
    elif path.name in ("manifest.json", "meta.json") and (path.parent / ".metadata").exists():
        # A save has a name drawn by torch, in .metadata; what hashes that file differs with it.
        fields = json.loads(content)
        content = json.dumps(_without(fields, (".metadata", "manifest", "checksum"))).encode()
    return hashlib.sha256(content).hexdigest()


def _without(value: Any, keys: Sequence[str]) -> Any:
    return {k: _without(v, keys) for k, v in value.items() if k not in keys} if isinstance(value, dict) else value
