"""Bad input: one clear line that names the key or the file, exit code 2, and nothing written or lost."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.writer import write_dataset
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.data.indexed import HEADER_BYTES, open_index
from remit_megatron.optional import importable
from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint, write_meta
from tests.ranks import run_ranks
from tests.train.runs import EOD, VOCAB, remit, settings

Case = tuple[str, str, list[str], str]
"""Name, recipe file, overrides, what the message must contain."""
COMMANDS = (["train"], ["check", "--ranks", "1"])
NOT_SEEN = ("check", "reference without weights")
"""`check` reads what checkpoints say of themselves, not their weights."""


def _cases(folder: Path) -> list[Case]:
    base, guided = folder / "mistake.toml", folder / "mistake_remit.toml"
    base.write_text(dump_toml(parse_recipe(settings(folder, "mistake"))))
    guided.write_text(dump_toml(parse_recipe(remit(folder, "mistake"))))
    broken = folder / "broken.toml"
    broken.write_text("run = \n")

    def damaged(name: str, change: Callable[[Path, Path], None]) -> str:
        for suffix in (".bin", ".idx"):
            shutil.copy(folder / f"train{suffix}", folder / f"{name}{suffix}")
        change(folder / f"{name}.bin", folder / f"{name}.idx")
        return f'data.train=[{{path="{folder / name}"}}]'

    def flip(position: int) -> Callable[[Path, Path], None]:
        def change(_: Path, idx: Path) -> None:
            content = bytearray(idx.read_bytes())
            content[position] ^= 4
            idx.write_bytes(content)

        return change

    documents = open_index(folder / "train").num_documents
    flipped = {
        "dtype": damaged("dtype", flip(17)),
        "length": damaged("length", flip(HEADER_BYTES + 4 * 7)),
        "pointer": damaged("pointer", flip(HEADER_BYTES + 4 * documents + 8 * 7)),
    }
    cut = damaged("cut", lambda bin_, _: os.truncate(bin_, bin_.stat().st_size - 100))
    exchanged = damaged("exchanged", lambda *_: None)
    shutil.copy(folder / "held.manifest.json", folder / "exchanged.manifest.json")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    write_dataset(folder / "named", [[1, 2, 3] * 20], vocab_size=VOCAB, eod_id=EOD, tokenizer_hash="ab" * 32)
    foreign = [f'data.train=[{{path="{folder / "named"}"}}]', f'data.tokenizer="{tokenizer}"']
    empty = damaged("empty", lambda _, idx: idx.write_bytes(b""))
    wide = folder / "wide_vocabulary"
    shutil.copytree(folder / "base", wide)
    for meta in wide.glob("checkpoints/*/meta.json"):
        shape = {**read_meta(meta.parent).shape, "vocab_size": 64}
        write_meta(meta.parent, replace(read_meta(meta.parent), shape=shape))
    untrained = folder / "untrained"
    shutil.copytree(folder / "base", untrained)
    last = resolve_checkpoint(str(untrained), "untrained")
    meta_of_last = read_meta(last)
    first = last.rename(last.with_name("step-00000000"))
    write_meta(first, replace(meta_of_last, step=0))
    (first.parent / "latest").write_text(f"{first.name}\n")
    torn = folder / "torn"
    shutil.copytree(folder / "base", torn)
    for shard in torn.glob("checkpoints/*/*.distcp"):
        shard.unlink()
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"train{suffix}", folder / f"bare{suffix}")
    bare = f'data.train=[{{path="{folder / "bare"}"}}]'
    b, g = str(base), str(guided)
    return [
        ("no such recipe", str(folder / "none.toml"), [], "none.toml: cannot be read"),
        ("no TOML", str(broken), [], "broken.toml: no valid TOML"),
        ("unknown key", b, ["optimizer.peek_lr=1"], "unknown key optimizer.peek_lr, did you mean peak_lr?"),
        ("unknown section", b, ["scheduel.x=1"], "unknown key scheduel, did you mean schedule?"),
        ("wrong type", b, ["optimizer.peak_lr=true"], "optimizer.peak_lr"),
        ("unknown objective", b, ["objective.name=remitt"], "did you mean remit?"),
        ("unknown objective key", g, ["objective.epsilom=0.1"], "did you mean epsilon?"),
        ("objective without reference", b, ["objective.name=remit"], "needs a [reference] section"),
        ("missing dataset", b, [f'data.train=[{{path="{folder}/nowhere"}}]'], "nowhere"),
        ("missing held-out set", b, [f'data.eval.other="{folder}/nowhere"'], "nowhere"),
        ("truncated .bin", b, [cut], "cut.bin"),
        ("flipped dtype code", b, [flipped["dtype"]], "dtype.idx: damaged"),
        ("flipped length", b, [flipped["length"]], "length.idx: damaged"),
        ("flipped pointer", b, [flipped["pointer"]], "pointer.idx: damaged"),
        ("manifest of other data", b, [exchanged], "the files do not belong together"),
        ("foreign tokenizer", b, foreign, "made with the tokenizer abababababab, not with the one named, "),
        ("empty .idx", b, [empty], "empty.idx"),
        ("id past the vocabulary", b, ["model.vocab_size=40"], "vocab"),
        ("heads", b, ["parallel.tensor=3", "model.num_query_groups=4"], "does not divide by parallel.tensor"),
        ("layers", b, ["parallel.pipeline=3"], "model.num_layers = 4 does not divide"),
        ("sequence", b, ["parallel.context=3"], "data.sequence_length = 16 does not divide by 2 x parallel.context"),
        ("batch", b, ["batch.global_batch_tokens=100"], "no multiple of data.sequence_length"),
        ("microbatch", b, ["batch.microbatch_samples=3"], "do not divide by batch.microbatch_samples"),
        ("ranks", b, ["parallel.tensor=2"], "1 ranks do not divide by"),
        ("no reference there", g, [f'reference.path="{folder}/nowhere"'], "reference.path"),
        ("reference with another vocabulary", g, [f'reference.path="{wide}"'], "vocabulary has 64 rows"),
        ("untrained reference", g, [f'reference.path="{untrained}"'], "it is untrained"),
        ("reference without weights", g, [f'reference.path="{torn}"'], "__0_0.distcp is missing"),
        ("checkpoint of another model", b, [f'model.init="{folder}/base"'], "contradicts the checkpoint of model.init"),
        ("run of another recipe", b, [f'run="{folder}/base"'], "holds another recipe's run (model.hidden_size = 24"),
        ("folder that is no run", b, [f'run="{folder}"'], "exists, is not empty and holds no run"),
        ("document centring without documents", g, ["objective.centering=document", bare], "needs data.eod_id"),
        ("document masks without documents", b, ["data.document_mask=true", bare], "needs data.eod_id"),
        ("EOD past the vocabulary", b, ["data.eod_id=61"], "data.eod_id = 61 is not in the vocabulary"),
        ("odd head width", b, ["model.kv_channels=7"], "model.kv_channels = 7 is odd"),
        ("infinite clip", b, ["optimizer.clip_grad_norm=inf"], "optimizer.clip_grad_norm"),
        ("merged scoring", g, ["reference.merge_microbatches=3"], "reference.merge_microbatches = 3 does not fit"),
        ("graph without CUDA", g, ["reference.cuda_graph=true"], "cuda_graph = true needs compute.device = 'cuda'"),
        ("run folder below a file", b, [f'run="{base}/run"'], "cannot be used"),
        ("scores below a file", g, [f'reference.write_scores="{base}/s"'], "reference.write_scores: "),
        *_absent(b),
    ]


def _absent(recipe: str) -> list[Case]:
    """What this machine lacks."""
    cases: list[tuple[bool, Case]] = [
        (importable("nvidia.dali"), ("DALI", recipe, ["data.loader=dali"], "needs NVIDIA DALI")),
        (
            importable("transformer_engine.pytorch"),
            ("TE", recipe, ["model.implementation=transformer_engine"], "Transformer Engine"),
        ),
        (torch.cuda.is_available(), ("CUDA", recipe, ["compute.device=cuda"], "compute.device = 'cuda'")),
    ]
    return [case for there, case in cases if not there]


def _run_cases(rank: int, cases: list[Case]) -> dict[tuple[str, str], Any]:
    """Every case through the command's own main, in one process."""
    from remit_megatron.cli import main
    from remit_megatron.mcore.groups import destroy_groups

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    import torch.distributed as dist

    dist.destroy_process_group()  # the command makes its own
    outcomes = {}
    for command in COMMANDS:
        for name, recipe, overrides, _ in cases:
            stderr = io.StringIO()
            with contextlib.redirect_stderr(stderr):
                code = main([*command, recipe, *[part for o in overrides for part in ("--set", o)]])
            outcomes[command[0], name] = (code, stderr.getvalue())
            destroy_groups()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the caller to destroy
    return outcomes


def _listing(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for p in folder.rglob("*")
        if p.is_file() and ".index" not in p.parts
    }


def test_each_mistake_is_one_line(folder: Path) -> None:
    cases = _cases(folder)
    before = _listing(folder)
    (outcomes,) = run_ranks(1, _run_cases, cases)
    problems = []
    for command, name, expected in [(c[0], n, e) for c in COMMANDS for n, _, _, e in cases if (c[0], n) != NOT_SEEN]:
        code, text = outcomes[command, name]
        lines = [line for line in text.splitlines() if line.startswith("remit: ")]
        if code != 2 or len(lines) != 1 or expected not in lines[0]:
            problems.append(f"{command}, {name}: exit code {code}, expected {expected!r} in one line, got {text!r}")
    assert not problems, "\n".join(problems)
    assert _listing(folder) == before, "a refused run wrote something"


def test_several_ranks_say_it_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from remit_megatron.cli import main

    recipe = folder / "once.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(folder, "once"))))
    assert (
        main(["train", str(recipe), "--nproc", "2", "--set", "parallel.tensor=1", "--set", "run=" + str(folder)]) == 2
    )
    assert capfd.readouterr().err.count("remit: ") == 1


def test_flags_that_cannot_be_are_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from remit_megatron.cli import main

    recipe, problems, tokenizer = tmp_path / "flags.toml", tmp_path / "problems.jsonl", tmp_path / "tokenizer.json"
    recipe.write_text(dump_toml(parse_recipe(settings(folder, "flags"))))
    problems.write_text('{"prompt": "a", "answer": "b"}\n')
    tokenizer.write_text("{")
    evaluate, score = ["eval", str(recipe), "--checkpoint", str(folder / "base")], ["score", str(recipe), "--follow"]
    for command, words in (
        ([*evaluate, "--output", str(tmp_path)], "is a folder"),
        ([*evaluate, "--problems", str(problems), "--set", f"data.tokenizer={tokenizer}"], "data.tokenizer: "),
        ([*score, "--output", str(tmp_path)], "do not go with it"),
        ([*score, "--shard", "0/2"], "do not go with it"),
    ):
        assert main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert words in lines[0]
