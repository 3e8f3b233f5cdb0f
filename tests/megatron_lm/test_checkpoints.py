"""Checkpoints and datasets of Megatron-LM come in as they are, and ours go out so that its `--load` goes on.

recorded/ has what core_v0.16.1 wrote: three steps of pretrain_gpt.py on one CPU rank (tied embeddings, 61 rows of the
vocabulary padded to 64, --no-save-optim), and what tools/preprocess_data.py made of corpus.jsonl.
"""

import io
import json
import pickle
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.writer import write_dataset
from remit_megatron.cli import main
from remit_megatron.config import parse_recipe
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.mcore.megatron_lm import checkpoint as theirs
from remit_megatron.mcore.megatron_lm.shapes import arguments_of, shape_of
from remit_megatron.run.build_plan import make_build_plan
from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint
from remit_megatron.shape import ModelShape
from tests.megatron_lm.scripts import MEGATRON_LM, needs_megatron_lm
from tests.ranks import run_ranks
from tests.train import runs

RECORDED = Path(__file__).parent / "recorded"
LAYERS, WIDTH, VOCAB, PADDED = 2, 16, 61, 64


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that Megatron-LM saved into."""
    shutil.copytree(RECORDED / "saved", tmp_path / "saved")
    return tmp_path / "saved"


def recipe(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """Two steps on the recorded dataset."""
    made = {
        "run": str(folder / run),
        "model": {"init": str(folder / "saved"), "vocab_size": VOCAB},
        "data": {"sequence_length": 16, "train": [{"path": str(RECORDED / "corpus_text_document")}]},
        "batch": {"global_batch_tokens": 64, "microbatch_samples": 2},
        "schedule": {"train_tokens": 128},
        "compute": {"device": "cpu", "threads": 1},
    }
    return {**made, **changes}


def test_the_newest_checkpoint_describes_itself(saved: Path) -> None:
    found = resolve_checkpoint(str(saved), "model.init")
    assert found == saved / "iter_0000003"
    assert resolve_checkpoint(str(found), "model.init") == found
    meta = read_meta(found, VOCAB)
    wanted = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "vocab_size": VOCAB,
        "tied_embeddings": True,
        "kv_channels": 8,
    }
    assert meta.step == 3
    assert meta.shape.items() >= wanted.items()
    assert read_meta(found).shape["vocab_size"] == PADDED, "without a number all rows are the model's"
    assert arguments_of(meta.model_shape(), found).items() >= {"swiglu": True, "rotary_base": 10000}.items()


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    """Runs from a recorded checkpoint, with itself as reference, before and after it is adopted; then the way back."""
    from remit_megatron.convert import megatron_lm

    place = Path(folder)
    recipes = [
        recipe(place, "ntp"),
        recipe(place, "remit", objective={"name": "remit"}, reference={"path": str(place / "saved/iter_0000003")}),
    ]
    outcomes = runs.train_all(rank, recipes)
    meta = megatron_lm.adopt(place / "saved", VOCAB)
    again = recipe(place, "adopted", model={"init": str(place / "saved/iter_0000003")})
    outcomes += runs.train_all(rank, [again])
    said = [megatron_lm.export(str(place / name), place / f"{name}-out") for name in ("ntp", "saved/iter_0000003")]
    back = recipe(place, "back", model={"init": str(place / "ntp-out")})
    outcomes += runs.train_all(rank, [back])
    return {"outcomes": outcomes, "meta": meta, "said": said}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron_lm")
    shutil.copytree(RECORDED / "saved", folder / "saved")
    (folder / "saved/iter_0000003-out").parent.mkdir(exist_ok=True)
    (result,) = run_ranks(1, on_rank, str(folder))
    return folder, result


def test_a_recorded_checkpoint_trains_as_student_and_reference(folder: tuple[Path, dict[str, Any]]) -> None:
    """Its first NLL is below the initial one, ReMiT beside itself is NTP bit for bit, and adopting changes nothing."""
    place, result = folder
    assert [code for code, _ in result["outcomes"]] == [0] * 4, result["outcomes"]
    ntp, remit, adopted = (runs.metrics(place, name) for name in ("ntp", "remit", "adopted"))
    assert ntp[0]["nll"] < np.log(VOCAB) - 0.05, "three steps at this rate have learnt something"
    assert remit[0]["weight_mean"] == 1.0 if "weight_mean" in remit[0] else remit[0]["weight"] == 1.0
    assert [line["nll"] for line in remit[:1]] == [line["nll"] for line in ntp[:1]]
    assert [line["nll"] for line in adopted] == [line["nll"] for line in ntp]
    assert result["meta"].step == 3
    assert read_meta(place / "saved/iter_0000003").shape["vocab_size"] == VOCAB


def test_what_goes_out(folder: tuple[Path, dict[str, Any]]) -> None:
    """A run's checkpoint as an iteration with what `--load` reads; another as a release; weights come back."""
    place, result = folder
    assert result["said"] == ["iteration 2 with the distributed optimizer's moments", "a release: weights alone"]
    out = place / "ntp-out"
    assert (out / theirs.TRACKER).read_text() == "2"
    common = torch.load(out / "iter_0000002/common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == 2
    assert common["optimizer"]
    args = common["args"]
    assert isinstance(args, Namespace)
    assert (args.num_layers, args.consumed_train_samples, args.no_save_rng, args.no_save_optim) == (2, 8, True, False)
    scheduler = megatron_lm_scheduler(common["opt_param_scheduler"])
    assert scheduler.num_steps == 8
    released = torch.load(place / "saved/iter_0000003-out/release/common.pt", weights_only=True)
    assert (place / "saved/iter_0000003-out" / theirs.TRACKER).read_text() == "release"
    assert "optimizer" not in released
    last, back = runs.metrics(place, "ntp"), runs.metrics(place, "back")
    assert back[0]["nll"] < last[0]["nll"]
    assert (
        shape_of(theirs.saved_arguments(out / "iter_0000002"), out)
        == read_meta(place / "saved/iter_0000003").model_shape()
    )


def megatron_lm_scheduler(state: dict[str, Any]) -> Any:
    """Megatron's own scheduler as Megatron-LM builds it for the recipe's schedule, in samples, with a state loaded."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    made = parse_recipe(recipe(Path(), "ntp"))
    group: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    scheduler = OptimizerParamScheduler(
        Namespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=made.optimizer.peak_lr,
        min_lr=made.optimizer.min_lr,
        lr_warmup_steps=0,
        lr_decay_steps=8,
        lr_decay_style="cosine",
        start_wd=made.optimizer.weight_decay,
        end_wd=made.optimizer.weight_decay,
        wd_incr_steps=8,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    scheduler.load_state_dict(state)
    return scheduler


def rewritten(saved: Path, **changes: Any) -> Path:
    """The checkpoint with other arguments."""
    path = saved / "iter_0000003/common.pt"
    common = torch.load(path, weights_only=False)
    for name, value in changes.items():
        setattr(common["args"], name, value)
    torch.save(common, path)
    return path.parent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "LayerNorm"}, "its norms are LayerNorm"),
        ({"add_bias_linear": True}, "its linear layers have biases"),
        ({"rotary_percent": 0.5}, "only 0.5 of each head is rotated"),
        ({"position_embedding_type": "learned_absolute"}, "its positions are learned_absolute"),
        ({"swiglu": False}, "its MLP is not SwiGLU"),
        ({"num_experts": 8}, "it is a mixture of experts"),
        ({"mtp_num_layers": 1}, "it predicts several tokens"),
        ({"multi_latent_attention": True}, "its attention is latent"),
    ],
)
def test_a_model_that_is_not_built_here_is_refused(saved: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_meta(rewritten(saved, **changes))


def test_folders_that_are_something_else_are_refused(saved: Path, tmp_path: Path) -> None:
    def expect(words: str, path: Path = saved) -> None:
        with pytest.raises(UserError, match=words):
            read_meta(resolve_checkpoint(str(path), "model.init"))

    old = tmp_path / "old"
    (old / "iter_0000003/mp_rank_00").mkdir(parents=True)
    (old / theirs.TRACKER).write_text("3")
    expect("old format .*--ckpt-convert-format torch_dist", old)
    (saved / "iter_0000003/run_config.yaml").write_text("model: {}")
    expect("Megatron-Bridge, which keeps its shape in run_config.yaml")
    (saved / "iter_0000003/run_config.yaml").unlink()
    with pytest.raises(UserError, match="64 rows of the vocabulary, fewer than 65"):
        read_meta(saved / "iter_0000003", 65)
    (saved / theirs.TRACKER).write_text("7")
    expect("names iter_0000007, which is not there")
    (saved / theirs.TRACKER).write_text("../elsewhere")
    expect("names no iteration but")
    (saved / "iter_0000003/common.pt").write_bytes(b"no archive")
    (saved / theirs.TRACKER).write_text("3")
    expect("common.pt: cannot be read")


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_no_code_of_a_checkpoint_runs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pickle in it names is never looked up, be it in the arguments or beside them."""
    monkeypatch.chdir(tmp_path)
    path = saved / "iter_0000003/common.pt"
    arguments = vars(theirs.saved_arguments(path.parent))
    content = {"args": Namespace(**{**arguments, "other": Evil()}), "more": Evil()}
    stream = io.BytesIO()
    pickle.dump(content, stream)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("common/data.pkl", stream.getvalue())
    assert read_meta(path.parent, VOCAB).shape["num_layers"] == LAYERS
    assert not Path("ran").exists()


def weights_left(rank: int, folder: str) -> str:
    """A checkpoint that has more weights than its arguments say."""
    place = rewritten(Path(folder), num_layers=1)
    outcome = runs.train_all(rank, [recipe(place.parent.parent, "one")])
    untied = rewritten(Path(folder), num_layers=2, untie_embeddings_and_output_weights=True)
    outcome += runs.train_all(rank, [recipe(untied.parent.parent, "untied")])
    return json.dumps(outcome)


def test_weights_that_nothing_takes_are_refused(saved: Path) -> None:
    (found,) = run_ranks(1, weights_left, str(saved))
    (first, one), (second, untied) = json.loads(found)
    assert (first, second) == (2, 2)
    assert "cannot be loaded" in one or "weights that the model its arguments describe does not take" in one
    assert "cannot be loaded" in untied


def test_commands(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "adopt", str(saved), "--vocab-size", str(VOCAB)]) == 0
    assert "step 3, 2 layers of width 16, 61 rows of the vocabulary, fp32" in capsys.readouterr().out
    assert main(["convert", "adopt", str(saved)]) == 2
    assert "has a meta.json already" in capsys.readouterr().err
    assert main(["convert", "to-megatron-lm", str(saved / "iter_0000003"), str(tmp_path / "out")]) == 0
    assert "a release: weights alone" in capsys.readouterr().out
    assert main(["convert", "to-megatron-lm", str(saved / "iter_0000003"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_preprocessed_data_is_what_tokenize_writes(tmp_path: Path) -> None:
    """Byte for byte; each document ends with the tokenizer's EOD, 60."""
    lines = (RECORDED / "corpus.jsonl").read_text().splitlines()
    documents = [[*map(int, json.loads(line)["text"].split())] for line in lines]
    write_dataset(str(tmp_path / "ours"), documents, vocab_size=VOCAB, eod_id=60)
    for suffix in ("bin", "idx"):
        recorded = (RECORDED / f"corpus_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == recorded


@needs_megatron_lm
def test_the_real_tool_still_writes_what_is_recorded(tmp_path: Path) -> None:
    import subprocess
    import sys

    tool = [sys.executable, "-W", "ignore", f"{MEGATRON_LM}/tools/preprocess_data.py", "--workers", "1"]
    tool += ["--input", str(RECORDED / "corpus.jsonl"), "--output-prefix", str(tmp_path / "corpus"), "--append-eod"]
    done = subprocess.run([*tool, "--tokenizer-type", "NullTokenizer", "--vocab-size", "60"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for suffix in ("bin", "idx"):
        name = f"corpus_text_document.{suffix}"
        assert (tmp_path / name).read_bytes() == (RECORDED / name).read_bytes()


def test_a_shape_goes_into_arguments_and_back() -> None:
    shape = ModelShape(
        num_layers=3, hidden_size=48, ffn_hidden_size=64, num_attention_heads=6, num_query_groups=2, kv_channels=16,
        vocab_size=100, tied_embeddings=False, rope_theta=5e5, norm_epsilon=1e-6, qk_norm="per_head", qkv_bias=True,
        rope_llama3_factor=32.0,
    )  # fmt: skip
    assert shape_of(Namespace(**arguments_of(shape, "here")), "here") == shape
    with pytest.raises(UserError, match="here: Megatron-LM's gpt_builder builds no model with norms after"):
        arguments_of(shape.model_copy(update={"norm_placement": "post"}), "here")


def test_the_plan_knows_it(saved: Path) -> None:
    """What a run would build; a damaged description is an error before anything is built."""
    plan = make_build_plan(parse_recipe(recipe(saved.parent, "ntp")), "cpu")
    assert plan.shape.vocab_size == VOCAB
    assert plan.init == saved / "iter_0000003"
    (saved / "iter_0000003/common.pt").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"common\.pt: cannot be read"):
        make_build_plan(parse_recipe(recipe(saved.parent, "ntp")), "cpu")
