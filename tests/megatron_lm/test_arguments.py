"""What a checkpoint of Megatron-LM says of itself, and what is refused; no torch is needed for any of it.

recorded/ has what core_v0.16.1 wrote: common.pt of pretrain_gpt.py on one CPU rank (tied embeddings, 61 rows of the
vocabulary padded to 64), and what tools/preprocess_data.py made of corpus.jsonl.
"""

import io
import json
import pickle
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from data_prep.writer import write_dataset
from remit_megatron.errors import UserError
from remit_megatron.mcore.megatron_lm import checkpoint as theirs
from remit_megatron.mcore.megatron_lm.shapes import arguments_of, shape_of
from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint
from remit_megatron.shape import ModelShape

RECORDED = Path(__file__).parent / "recorded"
VOCAB = 61


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that Megatron-LM saved into, without its weights."""
    inside = tmp_path / "saved/iter_0000003"
    inside.mkdir(parents=True)
    shutil.copy(RECORDED / "common.pt", inside)
    (inside / theirs.METADATA).touch()
    (tmp_path / "saved" / theirs.TRACKER).write_text("3")
    return tmp_path / "saved"


def test_the_newest_checkpoint_describes_itself(saved: Path) -> None:
    found = resolve_checkpoint(str(saved), "model.init")
    assert found == saved / "iter_0000003"
    assert resolve_checkpoint(str(found), "model.init") == found
    meta = read_meta(found, VOCAB)
    wanted = {"num_layers": 2, "hidden_size": 16, "vocab_size": VOCAB, "tied_embeddings": True, "kv_channels": 8}
    assert meta.step == 3
    assert meta.shape.items() >= wanted.items()
    assert read_meta(found).shape["vocab_size"] == 64, "without a number all rows are the model's"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("normalization", "LayerNorm", "its norms are LayerNorm"),
        ("add_bias_linear", True, "its linear layers have biases"),
        ("rotary_percent", 0.5, "only 0.5 of each head is rotated"),
        ("position_embedding_type", "learned_absolute", "its positions are learned_absolute"),
        ("swiglu", False, "its MLP is not SwiGLU"),
        ("num_experts", 8, "it is a mixture of experts"),
        ("mtp_num_layers", 1, "it predicts several tokens"),
        ("multi_latent_attention", True, "its attention is latent"),
    ],
)
def test_a_model_that_is_not_built_here_is_refused(saved: Path, name: str, value: Any, words: str) -> None:
    arguments = theirs.saved_arguments(saved / "iter_0000003")
    assert shape_of(arguments, "here").num_layers == 2
    setattr(arguments, name, value)
    with pytest.raises(UserError, match=f"here: cannot be read: {words}"):
        shape_of(arguments, "here")


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
    expect(r"common\.pt: cannot be read")


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
    pickle.Pickler(stream).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("common/data.pkl", stream.getvalue())
    assert read_meta(path.parent, VOCAB).shape["num_layers"] == 2
    assert not Path("ran").exists()


def test_preprocessed_data_is_what_tokenize_writes(tmp_path: Path) -> None:
    """Byte for byte; each document ends with the tokenizer's EOD, 60."""
    lines = (RECORDED / "corpus.jsonl").read_text().splitlines()
    documents = [[*map(int, json.loads(line)["text"].split())] for line in lines]
    write_dataset(str(tmp_path / "ours"), documents, vocab_size=VOCAB, eod_id=60)
    for suffix in ("bin", "idx"):
        recorded = (RECORDED / f"corpus_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == recorded


def test_a_shape_goes_into_arguments_and_back() -> None:
    shape = ModelShape(
        num_layers=3, hidden_size=48, ffn_hidden_size=64, num_attention_heads=6, num_query_groups=2, kv_channels=16,
        vocab_size=100, tied_embeddings=False, rope_theta=5e5, norm_epsilon=1e-6, qk_norm="per_head", qkv_bias=True,
        rope_llama3_factor=32.0,
    )  # fmt: skip
    assert shape_of(Namespace(**arguments_of(shape, "here")), "here") == shape
    with pytest.raises(UserError, match="here: Megatron-LM's gpt_builder builds no model with norms after"):
        arguments_of(shape.model_copy(update={"norm_placement": "post"}), "here")
