"""Recipes, `--set` and profiles: TOML that a user writes."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

import remit_megatron.check
import remit_megatron.plan  # noqa: F401 - here, and so by no fork
from data_prep.writer import write_dataset
from launch.backends import open_backend
from remit_megatron import toml
from remit_megatron.cli import main
from tests.fuzz.framework import Target, register

RECIPE: dict[str, Any] = {
    "run": "run",
    "seed": 5,
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 61,
        "tied_embeddings": True,
    },
    "data": {"sequence_length": 16, "train": [{"path": "train", "weight": 2.0}], "eval": {"held": "held"}},
    "batch": {"global_batch_tokens": 128, "microbatch_samples": 2},
    "optimizer": {"peak_lr": 3e-3, "min_lr": 1e-4, "beta2": 0.95},
    "schedule": {"train_tokens": 1280, "warmup_tokens": 128},
    "compute": {"device": "cpu", "threads": 1},
    "objective": {"name": "ntp"},
    "evaluation": {"every_steps": 6, "samples": 5},
    "checkpoint": {"every_steps": 6, "keep": 3},
    "watchdog": {"step_timeout_s": 60},
}


def prepare(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("train", "held"):
        ids = [generator.integers(1, 61, 50).tolist() for _ in range(20)]
        write_dataset(folder / name, ids, vocab_size=61, eod_id=0)
    (folder / "recipe.toml").write_text(toml.dumps(RECIPE))


def sane(settings: dict[str, Any]) -> str | None:
    """What is wrong with a recipe that was accepted, by rules of its own."""
    model, data, batch = settings.get("model", {}), settings["data"], settings["batch"]
    counts = [value for name, value in model.items() if name.startswith(("num_", "hidden", "ffn", "vocab"))]
    counts += [data["sequence_length"], batch["global_batch_tokens"], batch.get("microbatch_samples", 1)]
    counts += [settings["schedule"]["train_tokens"]]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 63 for n in counts):
        return f"accepted, with a count that is none: {counts}"
    if batch["global_batch_tokens"] % data["sequence_length"]:
        return "accepted, with a batch of no whole samples"
    peak = settings["optimizer"]["peak_lr"]
    if not 0 < peak < math.inf or not settings["optimizer"].get("min_lr", 0) <= peak:
        return f"accepted, with a learning rate of {peak}"
    if not all(0 < source.get("weight", 1.0) < math.inf for source in data["train"]):
        return "accepted, with a weight that is none"
    if not settings["run"].strip() or "\0" in settings["run"]:
        return "accepted, without a place for the run"
    return None if not unknown(settings) else f"accepted, with unknown keys: {unknown(settings)}"


def unknown(settings: dict[str, Any]) -> list[str]:
    from remit_megatron.config import Recipe

    return [key for key in settings if key not in Recipe.model_fields]


def recipe(folder: Path, valid: Path) -> str | None:
    return sane(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))


SETTINGS = ("optimizer.peak_lr=0.01", 'run="another"', "data.sequence_length=8", "compute.precision=fp32",
            'data.train=[{path = "train"}]', "objective.name=ntp", "schedule.train_tokens=2560",
            "model.init=", 'logging.wandb="off"', "watchdog.step_timeout_s=5")  # fmt: skip


def prepare_set(folder: Path) -> None:
    prepare(folder)
    (folder / "set").mkdir()
    for number, text in enumerate(SETTINGS):
        if not text.endswith("="):
            (folder / "set" / f"{number}.txt").write_text(text)


def override(folder: Path) -> str | None:
    """The one text of the folder's that is no longer as it was; none where all are."""
    paths = sorted((folder / "set").iterdir())
    texts = {path: path.read_bytes().replace(b"\0", b"").decode(errors="surrogateescape") for path in paths}
    return next((text for text in texts.values() if text not in SETTINGS), None)


def check_with_set() -> int:
    text = override(Path())
    return main(["check", "recipe.toml", *(("--set", text) if text is not None else ())])


def with_set(folder: Path, valid: Path) -> str | None:
    """The settings that a reader of TOML alone would make of the recipe and the one line."""
    settings: Any = json.loads(json.dumps(RECIPE))
    text = override(folder)
    if text is None:
        return None
    key, _, value = text.partition("=")
    try:
        new = tomllib.loads(f"x = {value}")["x"] if len(value.splitlines()) == 1 else None
    except tomllib.TOMLDecodeError:
        new = value
    place = settings
    *path, last = key.strip().split(".")
    for name in path:
        place = place.setdefault(name, {})
    place[last] = new
    return sane(settings)


PROFILE: dict[str, Any] = {
    "gpus_per_node": 2,
    "slurm": {"partition": "gpu", "time_limit": "24:00:00", "exclusive": True, "modules": ["a/1"], "cpus_per_task": 3},
    "environment": {"pass": ["WANDB_API_KEY"], "set": {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}},
    "container": {"image": "remit:1", "mounts": ["/data:/data"]},
}
TIME_LIMIT = re.compile(r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def prepare_profile(folder: Path) -> None:
    (folder / "profile.toml").write_text(toml.dumps(PROFILE))


def read_profile() -> None:
    open_backend("slurm:profile.toml")


def profile(folder: Path, valid: Path) -> str | None:
    settings = tomllib.loads((folder / "profile.toml").read_text(encoding="utf-8"))
    slurm = settings.get("slurm", {})
    limit = slurm.get("time_limit", "1")
    if not TIME_LIMIT.fullmatch(limit):
        return f"accepted, with the time limit {limit!r}"
    names = settings.get("environment", {}).get("set", {})
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "REMIT_RECIPE", "SLURM_PROCID"} & names.keys():
        return "accepted, with a variable that tells ranks which they are"
    lines = [limit, slurm.get("partition", ""), *names.values(), *slurm.get("modules", [])]
    return "accepted, with a second line in a value" if any("\n" in line or "\r" in line for line in lines) else None


register(Target("recipe", prepare, ("recipe.toml",), ("check", "recipe.toml"), recipe, ("train.*",), share=2))
register(Target("recipe.plan", prepare, ("recipe.toml",), ("plan", "recipe.toml", "--gpus", "2"), recipe, ("train.*",)))
register(Target("recipe.set", prepare_set, ("set/*",), check_with_set, with_set, ("train.*", "recipe.toml"), share=2))
register(Target("profile", prepare_profile, ("profile.toml",), read_profile, profile, share=2))
