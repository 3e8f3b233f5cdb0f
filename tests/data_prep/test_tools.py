"""verify, stats, peek, merge, mix, index and select, by function and by command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.inspect import peek, stats
from data_prep.merge import merge
from data_prep.mix import build_indices, mix, table
from data_prep.select import difference_sampling, select
from data_prep.tokenize import TokenizeSettings, tokenize
from data_prep.work import claimed
from data_prep.writer import DatasetWriter, write_dataset
from remit_megatron.cli import main
from remit_megatron.config import Recipe, parse_recipe
from remit_megatron.data.indexed import bin_path, open_index
from remit_megatron.data.manifest import Manifest, fingerprint, manifest_path, quick_verify
from remit_megatron.errors import UserError
from tests.data_prep.conftest import megatron_files, our_files


def documents(seed: int, count: int = 50, vocab: int = 100) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, vocab, size) for size in generator.integers(1, 40, count)]


def make(path: Path, seed: int, **changes: object) -> str:
    write_dataset(path, documents(seed), **({"vocab_size": 100, "eod_id": 0, "tokenizer_hash": "aa"} | changes))  # type: ignore[arg-type]
    return str(path)


def test_merge(tmp_path: Path) -> None:
    prefixes = [make(tmp_path / str(seed), seed) for seed in range(3)]
    manifest = merge(prefixes, str(tmp_path / "all"))
    expected = [np.append(ids, 0) for seed in range(3) for ids in documents(seed)]
    assert our_files(tmp_path / "all") == megatron_files(tmp_path / "theirs", expected, 100)
    assert manifest == Manifest.read(tmp_path / "all")
    whole = write_dataset(tmp_path / "w", expected, vocab_size=100, eod_id=0, append_eod=False, tokenizer_hash="aa")
    assert manifest.model_copy(update={"provenance": {}}) == whole
    assert [source["tokens"] for source in manifest.provenance["sources"]] == [
        quick_verify(p).num_tokens for p in prefixes
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_hash": "bb"}, "tokenizer_hash is bb, but .* has aa"),
        ({"eod_id": 1}, "eod_id is 1"),
        ({"vocab_size": 70_000}, "dtype is int32"),
        ({"vocab_size": 101}, "vocab_size is 101"),
    ],
)
def test_merge_refuses_other_kinds(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    prefixes = [make(tmp_path / "a", 0), make(tmp_path / "b", 1, **settings)]
    with pytest.raises(UserError, match=message):
        merge(prefixes, str(tmp_path / "all"))
    assert sorted(path.stem for path in tmp_path.glob("*.bin")) == ["a", "b"]


def test_merge_of_one_tokenizer_by_two_names(tmp_path: Path) -> None:
    """A dataset of a version that knew the tokenizer by its file's hash, and one of a file that was saved again."""
    before, now, again = "c" * 64, *(f"{'a' * 32}-{'b' * 16}-{digit * 16}-{'d' * 12}" for digit in "ce")
    for name, hashes in {"x": (before, now), "y": (now, again), "z": (now, before)}.items():
        parts = [make(tmp_path / f"{name}{i}", i, tokenizer_hash=known) for i, known in enumerate(hashes)]
        assert merge(parts, str(tmp_path / name)).tokenizer_hash == now
    other = make(tmp_path / "other", 1, tokenizer_hash=before.replace("c", "e"))
    with pytest.raises(UserError, match=r"other\.manifest\.json: tokenizer_hash is e{64}, but .*x1 has a{32}-"):
        merge([str(tmp_path / "x0"), other, str(tmp_path / "x1")], str(tmp_path / "all"))


def test_merge_refuses_damage_and_names(tmp_path: Path) -> None:
    prefix, other = make(tmp_path / "a", 0), make(tmp_path / "b", 1)
    for output, message in (
        (prefix, "is a dataset that is read"),
        (other, "is a dataset that is read"),
        (str(tmp_path / "c"), ""),
    ):
        if message:
            with pytest.raises(UserError, match=message):
                merge([prefix, other], output)
    (tmp_path / "link").symlink_to(tmp_path)
    for spelling in (prefix, str(tmp_path / "link" / "a")):
        with pytest.raises(UserError, match="is a dataset that is read"):
            merge([prefix, other], spelling, overwrite=True)
    manifest_path(other).unlink()
    with pytest.raises(UserError, match="no manifest; `remit data verify --adopt"):
        merge([prefix, other], str(tmp_path / "c"))


def test_stats_and_peek(tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]) -> None:
    texts = ["one", "caf\u00e9 \U0001f600\n", "x" * 500]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    folder, output = str(tokenizer_dirs["olmo2"]), str(tmp_path / "data")
    tokenize(TokenizeSettings(inputs=[str(path)], tokenizer=folder, output=output, workers=1, append_eod=True))
    figures = stats(output)
    lengths = [len(open_index(output).document(n)) for n in range(3)]
    assert (figures["documents"], figures["tokens"]) == (3, sum(lengths))
    assert figures["document_tokens"]["max"] == max(lengths)
    assert figures["document_tokens"]["mean"] == pytest.approx(sum(lengths) / 3, abs=0.005)
    shown = peek(output, 1, tokenizer=folder)
    assert texts[1] + "<|endoftext|>" in shown
    assert " ".join(map(str, open_index(output).document(1).tolist())) in shown
    assert "--tokenizer" in peek(output, 0)
    assert len(peek(output, 2, max_tokens=5).splitlines()[1].split()) == 5
    with pytest.raises(UserError, match="document 3 does not exist"):
        peek(output, 3)
    with pytest.raises(UserError, match="made with the tokenizer"):
        peek(output, 0, tokenizer=str(tokenizer_dirs["gpt2"]))


def recipe(tmp_path: Path, train: list[dict[str, object]], tokens: int = 6400, **data: object) -> Recipe:
    return parse_recipe(
        {
            "run": str(tmp_path / "run"),
            "model": {"vocab_size": 100},
            "data": {"sequence_length": 16, "train": train, **data},
            "batch": {"global_batch_tokens": 64},
            "optimizer": {"peak_lr": 1e-3},
            "schedule": {"train_tokens": tokens},
        }
    )


def test_mix(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", 0), make(tmp_path / "b", 1)
    shares = mix(recipe(tmp_path, [{"path": a, "weight": 3.0}, {"path": b, "weight": 1.0}], tokens=6400))
    assert [share.run_samples for share in shares] == [300, 100]
    assert [share.run_tokens for share in shares] == [4800, 1600]
    tokens = [quick_verify(prefix).num_tokens for prefix in (a, b)]
    assert [share.tokens for share in shares] == tokens
    assert [share.epochs for share in shares] == [
        pytest.approx(samples / ((count - 1) // 16)) for samples, count in zip((300, 100), tokens, strict=True)
    ]
    assert shares[0].epochs > 4 > shares[1].epochs
    assert "epochs; above 4" in shares[0].warnings[0]
    assert not shares[1].warnings
    assert "75.00%" in table(shares)
    changed = recipe(tmp_path, [{"path": a}])
    with pytest.raises(UserError, match="outside the model's vocabulary of 50"):
        mix(changed.model_copy(update={"model": changed.model.model_copy(update={"vocab_size": 50})}))


def test_mix_and_index_hold_to_the_recipes_tokenizer(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> None:
    other = recipe(tmp_path, [{"path": make(tmp_path / "a", 0)}], tokenizer=str(tokenizer_dirs["gpt2"]))
    for command in (mix, build_indices):
        with pytest.raises(UserError, match="made with the tokenizer"):
            command(other)


def test_index(tmp_path: Path) -> None:
    """Every source's index is there before a run starts, and the run's own call finds it."""
    a, b = make(tmp_path / "a", 0), make(tmp_path / "b", 1)
    plan = recipe(tmp_path, [{"path": a}, {"path": b}], eval={"held": b}, cache_dir=str(tmp_path / "cache"))
    lines = build_indices(plan)
    assert len(lines) == 2
    assert f"{(quick_verify(a).num_tokens - 1) // 16:,} samples of 16 tokens" in lines[0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(before) == 6
    assert build_indices(plan) == lines
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == before


@settings(deadline=None)
@given(
    scores=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    keep=st.sampled_from([0.25, 0.5, 0.8, 1.0]),
)
def test_difference_sampling(scores: list[tuple[int, int]], keep: float) -> None:
    """Against a sort in plain Python: int(keep x N) documents of the largest small - large, the earlier of equals."""
    large, small = (np.array(side, dtype=float) for side in zip(*scores, strict=True))
    count = int(keep * len(scores))
    if not count:
        with pytest.raises(UserError, match="keeps none"):
            difference_sampling(large, small, keep)
        return
    order = sorted(range(len(scores)), key=lambda n: (scores[n][0] - scores[n][1], n))
    assert np.flatnonzero(difference_sampling(large, small, keep)).tolist() == sorted(order[:count])


def save_scores(path: Path, values: np.ndarray, named: str | None = None) -> Path:
    np.save(path, values)
    if named is not None:
        Path(f"{path}.json").write_text(json.dumps({"fingerprint": named}))
    return path


def test_select(tmp_path: Path) -> None:
    """Scores by token and by document choose the same documents, in the order of the dataset."""
    prefix = make(tmp_path / "a", 0)
    data, generator = open_index(prefix), np.random.default_rng(4)
    large, small = (generator.random(data.num_tokens) * 5 for _ in range(2))
    large[::7] = small[::7] = np.nan
    ends = np.cumsum(data.lengths)
    lone = data.lengths < 8  # at least one token of the others is scored
    for part in np.split(np.arange(data.num_tokens), ends[:-1]):
        if np.isnan(large[part]).all():
            large[part] = small[part] = 1.0
    means = [np.array([np.nanmean(part) for part in np.split(side, ends[:-1])]) for side in (large, small)]
    identity = fingerprint(Manifest.read(prefix))  # type: ignore[arg-type]
    by_token = select(
        prefix,
        large=save_scores(tmp_path / "large.npy", large, identity),
        small=save_scores(tmp_path / "small.npy", small, identity),
        keep=0.6,
        output=str(tmp_path / "t"),
    )
    by_document = select(
        prefix,
        large=save_scores(tmp_path / "l.npy", means[0]),
        small=save_scores(tmp_path / "s.npy", means[1]),
        keep=0.6,
        output=str(tmp_path / "d"),
    )
    assert lone.any()
    assert (by_token["scores_tied_to_dataset"], by_document["scores_tied_to_dataset"]) == (True, False)
    assert our_files(tmp_path / "t") == our_files(tmp_path / "d")
    score = means[1] - means[0]
    best = sorted(np.argsort(-score)[:30].tolist())
    kept = open_index(tmp_path / "t")
    assert [kept.document(n).tolist() for n in range(30)] == [data.document(n).tolist() for n in best]
    assert kept.num_documents == by_token["kept"]["documents"] == 30
    assert by_token["kept"]["score_mean"] == pytest.approx(score[best].mean())
    assert by_token["threshold"] == pytest.approx(np.sort(score)[-30])
    assert json.loads(Path(f"{tmp_path}/t.select.json").read_text()) == by_token
    manifest = Manifest.read(tmp_path / "t")
    assert manifest is not None
    assert (manifest.eod_id, manifest.tokenizer_hash) == (0, "aa")


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    lengths=st.lists(st.integers(1, 30), min_size=40, max_size=40),
    keep=st.sampled_from([0.25, 0.5, 0.8, 1.0]),
)
def test_share_of_the_tokens(scores: list[int], lengths: list[int], keep: float) -> None:
    """The best documents, one after the other, for as long as they hold no more than that share of the tokens."""
    sizes = lengths[: len(scores)]
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    kept, total = [], 0
    for document in order:
        total += sizes[document]
        if total > keep * sum(sizes):
            break
        kept.append(document)
    arguments = np.zeros(len(scores)), np.array(scores, dtype=float), keep
    if not kept:
        with pytest.raises(UserError, match="keeps none"):
            difference_sampling(*arguments, lengths=np.array(sizes))
        return
    assert np.flatnonzero(difference_sampling(*arguments, lengths=np.array(sizes))).tolist() == sorted(kept)


def test_select_by_tokens(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", 0)
    data, score = open_index(prefix), np.random.default_rng(1).random(50)
    large, small = save_scores(tmp_path / "l.npy", np.zeros(50)), save_scores(tmp_path / "s.npy", score)
    report = select(prefix, large=large, small=small, keep=0.6, by="tokens", output=str(tmp_path / "t"))
    assert report["keep_of"] == "tokens"
    kept = np.flatnonzero(score >= report["threshold"])
    assert report["kept"] == report["kept"] | {"documents": len(kept), "tokens": int(data.lengths[kept].sum())}
    assert 0.5 < report["kept"]["tokens"] / data.num_tokens <= 0.6
    chosen = open_index(tmp_path / "t")
    assert np.array_equal(chosen.tokens, np.concatenate([data.document(n) for n in kept]))


def test_select_with_empty_documents(tmp_path: Path) -> None:
    """They have no score, and do not take a neighbour's; wherever they stand, the last place too."""
    tokens, lengths = np.arange(9), np.array([0, 3, 0, 4, 2, 0])
    with claimed(str(tmp_path / "a")) as work:
        writer = DatasetWriter(str(tmp_path / "a"), work, vocab_size=20)
        writer.append(tokens, lengths)
        writer.commit()
    small = save_scores(tmp_path / "s.npy", np.array([1.0, 1, 1, 9, 9, 9, 9, 5, 5]))
    large = save_scores(tmp_path / "l.npy", np.zeros(9))
    select(str(tmp_path / "a"), large=large, small=small, keep=0.35, output=str(tmp_path / "t"))
    assert open_index(tmp_path / "t").tokens.tolist() == [3, 4, 5, 6, 7, 8]


def test_select_refusals(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", 0)
    good = save_scores(tmp_path / "good.npy", np.ones(50))
    cases = [
        (save_scores(tmp_path / "n.npy", np.ones(49)), 0.8, "shape .49,.; floats for each of 50 documents"),
        (save_scores(tmp_path / "i.npy", np.ones(50, dtype=int)), 0.8, "int64 of shape"),
        (
            save_scores(tmp_path / "nan.npy", np.where(np.arange(50) == 7, np.nan, 1.0)),
            0.8,
            "document 7 has the score nan",
        ),
        (save_scores(tmp_path / "f.npy", np.ones(50), "0" * 64), 0.8, "scores of the dataset 000000000000, not of"),
        (tmp_path / "none.npy", 0.8, "no readable .npy"),
        (good, 0.0, "--keep 0.0"),
    ]
    np.save(tmp_path / "pickle.npy", np.array([{}] * 50), allow_pickle=True)
    cases.append((tmp_path / "pickle.npy", 0.8, "no readable .npy"))
    for scores, keep, message in cases:
        with pytest.raises(UserError, match=message):
            select(prefix, large=scores, small=good, keep=keep, output=str(tmp_path / "out"))
    assert not bin_path(tmp_path / "out").exists()
    with pytest.raises(UserError, match="is a dataset that is read"):
        select(prefix, large=good, small=good, output=prefix, overwrite=True)


def test_datatrove_output_loads(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    """A pipeline of datatrove's, as its users run it: what it writes is adopted here, and is our own bytes."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    texts = ["first document", "second\n\none", "caf\u00e9 \U0001f600 " * 40, "a<|endoftext|>b"]
    (tmp_path / "in").mkdir()
    path = write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    file = tokenizer_dirs["olmo2"] / "tokenizer.json"
    steps = [
        JsonlReader(str(path.parent), text_key="text"),
        MegatronDocumentTokenizer(
            str(tmp_path / "theirs"), tokenizer_name_or_path=str(file), eos_token="<|endoftext|>"
        ),
    ]
    LocalPipelineExecutor(pipeline=steps, tasks=1, logging_dir=str(tmp_path / "logs")).run()
    (theirs,) = (str(path.with_suffix("")) for path in (tmp_path / "theirs").glob("*.bin"))
    ours = str(tmp_path / "ours")
    tokenize(TokenizeSettings(inputs=[str(path)], tokenizer=str(file.parent), output=ours, workers=1, append_eod=True))
    assert our_files(Path(theirs)) == our_files(Path(ours))
    assert "no manifest" in quick_verify(theirs).warnings[0]
    assert main(["data", "verify", theirs, "--adopt", "--eod-id", "0", "--tokenizer", str(file)]) == 0
    info, own = quick_verify(theirs), quick_verify(ours)
    assert (info.fingerprint, info.tokenizer_hash, info.eod_id) == (own.fingerprint, own.tokenizer_hash, own.eod_id)


def test_command_line(
    tmp_path: Path,
    tokenizer_dirs: dict[str, Path],
    write_jsonl: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every subcommand from raw text to a merged dataset; mistakes give exit code 2 and one line."""
    path = write_jsonl(tmp_path / "in.jsonl", [f"text number {n}" for n in range(40)])
    shared = ["--tokenizer", str(tokenizer_dirs["olmo2"]), "--workers", "1", "--append-eod"]
    for name in ("a", "b"):
        assert main(["data", "tokenize", str(path), "--output", str(tmp_path / name), *shared]) == 0
    assert "40 documents" in capsys.readouterr().out
    assert main(["data", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "all")]) == 0
    assert main(["data", "verify", str(tmp_path / "all"), "--full", "--tokenizer", str(tokenizer_dirs["olmo2"])]) == 0
    assert "sound: 80 documents" in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path / "all")]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 80
    assert (
        main(["data", "peek", str(tmp_path / "all"), "--doc", "41", "--tokenizer", str(tokenizer_dirs["olmo2"])]) == 0
    )
    assert "text number 1<|endoftext|>" in capsys.readouterr().out
    (tmp_path / "r.toml").write_text(
        f'run = "{tmp_path}/run"\n[model]\nvocab_size = 600\n[data]\nsequence_length = 16\n'
        f'train = [{{path = "{tmp_path}/all"}}]\n[batch]\nglobal_batch_tokens = 32\n[optimizer]\npeak_lr = 1e-3\n'
        "[schedule]\ntrain_tokens = 320\n"
    )
    assert main(["data", "mix", str(tmp_path / "r.toml"), "--json", "--set", "schedule.train_tokens=640"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["run_samples"] == 40
    scores = [str(save_scores(tmp_path / f"{n}.npy", np.arange(80.0) * n)) for n in (1, 2)]
    command = ["data", "select", str(tmp_path / "all"), "--large", scores[0], "--small", scores[1], "--keep", "0.25"]
    assert main([*command, "--output", str(tmp_path / "best")]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["documents"] == 20
    bin_path(tmp_path / "all").write_bytes(bin_path(tmp_path / "all").read_bytes()[:-2])
    for command in (["data", "verify", str(tmp_path / "all")], ["data", "mix", str(tmp_path / "r.toml")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("remit: ")
        assert "all.bin: damaged" in error
        assert error.count("\n") == 1
