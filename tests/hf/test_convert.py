"""The convert commands as a user types them: what they make, and what they say of a bad folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from remit_megatron.convert.exporter import left_behind
from remit_megatron.hf.tokenizer import FILES
from tests.hf import tiny
from tests.hf.converting import commands, make_models, write_tokenizer
from tests.hf.damage import halve, list_once, one_file, store_twice, tensors_of
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("convert"))


def test_good_commands(root: Path) -> None:
    """One spawn for what works, in order."""
    llama, smol, youtu, out = (str(root / x) for x in ("llama", "smollm3", "youtu", "out"))
    repeated = root / "youtu repeated"  # as the published base has it: tied, and the head stored all the same
    shutil.copytree(youtu, repeated)
    one_file(repeated, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    half = root / "llama half"
    shutil.copytree(llama, half)
    halve(torch.bfloat16)(half)
    other_theta = root / "llama other theta"
    shutil.copytree(llama, other_theta)
    tiny.edit_config(other_theta, rope_theta=1e6, rope_parameters=None)
    old_youtu = root / "youtu old"  # a config as transformers 4 would have written it
    shutil.copytree(youtu, old_youtu)
    yarn = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    tiny.edit_config(old_youtu, rope_theta=700.0, rope_scaling=yarn, rope_parameters=None)
    with_tables = root / "llama tables"  # as Llama 2 was saved: each layer's rotary frequencies, in float32
    shutil.copytree(half, with_tables)
    one_file(
        with_tables,
        lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}),
    )
    stored: dict[str, Callable[[Path], None]] = {
        "twice": lambda folder: store_twice(folder, 1.0),
        "once": lambda folder: list_once(folder, "model.embed_tokens.weight"),
        "head only": lambda folder: list_once(folder, "lm_head.weight"),
    }
    for name, change in stored.items():
        shutil.copytree(smol, root / name)
        change(root / name)
    odd = root / "llama odd"
    shutil.copytree(llama, odd)
    tiny.edit_config(odd, trained_by="somebody")
    lines = [
        ["convert", "import", llama, f"{out}/llama"],
        ["convert", "verify", llama, f"{out}/llama", "--text", "a b c ! 0 9", "--tolerance", "1e-5"],
        ["convert", "verify", str(other_theta), f"{out}/llama", "--text", "a b c ! 0 9"],
        ["convert", "import", str(repeated), f"{out}/repeated"],
        ["convert", "export", f"{out}/repeated", f"{out}/repeated hf", "--like", youtu],
        ["convert", "import", str(half), f"{out}/half"],
        ["convert", "export", f"{out}/half", f"{out}/half hf", "--like", str(half), "--max-shard-gb", "1e-5"],
        ["convert", "import", llama, f"{out}/rounded", "--dtype", "bf16"],
        ["convert", "export", f"{out}/llama", f"{out}/theta hf", "--like", str(other_theta)],
        ["convert", "export", f"{out}/half", f"{out}/wide hf", "--like", llama, "--dtype", "fp32"],
        ["convert", "import", str(old_youtu), f"{out}/old"],
        ["convert", "export", f"{out}/old", f"{out}/old hf", "--like", str(old_youtu)],
        ["convert", "import", str(with_tables), f"{out}/tables"],
        ["convert", "export", f"{out}/tables", f"{out}/tables hf", "--like", str(half)],
        *(["convert", "import", str(root / name), f"{out}/{name}"] for name in stored),
        *(["convert", "export", f"{out}/{name}", f"{out}/{name} hf", "--like", smol] for name in stored),
        ["convert", "import", str(odd), f"{out}/odd", "--allow-key", "trained_by"],
        ["convert", "import", llama, f"{out}/llama"],
        ["convert", "export", f"{out}/half", f"{out}/half hf", "--like", str(half), "--max-shard-gb", "1e-5"],
        ["convert", "import", smol, f"{out}/llama"],
        ["convert", "export", f"{out}/llama", f"{out}/half hf", "--like", llama],
        ["convert", "import", llama, f"{out}/no/such/place"],
        ["convert", "import", "org/model", f"{out}/hub"],
        ["convert", "import", str(root / "absent"), f"{out}/hub"],
        ["convert", "export", f"{out}/llama", f"{out}/wrong", "--like", smol],
        ["convert", "export", f"{out}/absent", f"{out}/wrong", "--like", smol],
    ]
    results = run_ranks(1, commands, lines)[0]
    assert [code for code, _, _ in results] == [0, 0, 1, *[0] * 20, *[2] * 7], results
    assert "it was there already" in results[21][1], "killed late, and started again"
    assert "was there already" in results[22][1]
    assert json.loads((Path(out) / "odd" / "meta.json").read_text())["origin"]["allowed_keys"] == "trained_by"
    tied = tensors_of(Path(smol))
    for name in stored:
        same = tensors_of(Path(out) / f"{name} hf")
        assert same.keys() == tied.keys()
        assert all(torch.equal(same[key], tied[key]) for key in tied), name
    says = [
        "exists already",
        "exists already",
        "is no folder",
        "needs a network",
        "does not exist",
        "is a smollm3 model",
        "does not exist",
    ]
    for (_, _, err), message in zip(results[-7:], says, strict=True):
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (root / "out" / "wrong").exists()
    assert "float32" in results[0][1]
    assert "bfloat16, rounded as asked" in results[7][1]
    assert "logits differ" in results[2][2]
    check_outputs(root, Path(out), half)
    for source, exported in ((llama, "theta hf"), (youtu, "old hf"), (youtu, "repeated hf")):
        assert torch.equal(logits(Path(source)), logits(root / "out" / exported)), exported


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def check_outputs(root: Path, out: Path, half: Path) -> None:
    repeated = tensors_of(out / "repeated hf")
    assert repeated.keys() == tensors_of(root / "youtu").keys(), "a tied head is written once"
    got, want = tensors_of(out / "half hf"), tensors_of(half)
    assert all(got[k].dtype is torch.bfloat16 and torch.equal(got[k], want[k]) for k in want)
    tables = tensors_of(out / "tables hf")
    assert tables.keys() == want.keys()
    assert all(torch.equal(tables[k], want[k]) for k in want)
    index = json.loads((out / "half hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(want)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert len(set(index["weight_map"].values())) > 2
    wide = tensors_of(out / "wide hf")
    assert all(wide[k].dtype is torch.float32 and torch.equal(wide[k], want[k].float()) for k in want)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / "half hf" / name).read_bytes() == (half / name).read_bytes()
    for folder, dtype in (("half hf", "bfloat16"), ("theta hf", "float32"), ("wide hf", "float32")):
        config = json.loads((out / folder / "config.json").read_text())
        # Of the checkpoint, whatever the folder that lends its config has.
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 700.0
        assert config.get("dtype", config.get("torch_dtype")) == dtype
    leftovers = [p.name for p in [*out.iterdir(), *(out / "half hf").iterdir()] if p.name.startswith(".")]
    assert leftovers == [".made_of"], "what an export made again asks for"


PAIRS: dict[str, tuple[int, str]] = {
    "same": (0, "does as a reference"),
    "chat": (2, "1 added tokens are in one only"),
    "chat allowed": (0, "1 added tokens are in one only"),
    "saved again": (0, "does as a reference"),
    "theta": (0, "rope_theta: 700 and 1e+06"),
    "length": (0, "max_position_embeddings = -1"),
    "depth": (0, "num_layers: 4 and 2"),
    "rows": (0, "vocabulary: 61 rows and 64, of one tokenizer: the rows past its ids are padding"),
    "rows and tokens": (2, "vocabulary: 61 rows and 64: their losses cannot be compared"),
    "tokens": (2, "tokenizer: another vocabulary"),
    "split": (2, "tokenizer: another pre-tokenizer"),
    "ignore_merges": (2, "tokenizer: model.ignore_merges is false in one and true in the other"),
    "single_word": (2, '"!" is found with single_word = false in one and not in the other'),
    "ids": (2, "ids up to 60, its model 60 rows"),
    "no tokenizer": (2, "no tokenizer.json in"),
}


def make_pairs(root: Path) -> None:
    for name in PAIRS:
        shutil.copytree(root / "llama", root / "pairs" / name)
    pairs = root / "pairs"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    token = {"id": 0, "content": "!", **flags}
    model = json.loads((root / "llama" / "tokenizer.json").read_text())["model"]
    model["vocab"]["#$"] = 60  # no merge leads to it
    for folder in (root / "llama", *(pairs / name for name in PAIRS)):
        write_tokenizer(folder, model=model, added_tokens=[token])
    chat = [token, {"id": 61, "content": "<|im_end|>", **flags}]
    for name in ("chat", "chat allowed"):
        write_tokenizer(pairs / name, model=model, added_tokens=chat)
        (pairs / name / "chat_template.jinja").write_text("x")
        tiny.edit_config(pairs / name, eos_token_id=60, vocab_size=62)
    written = {**model, "dropout": 0.0, "merges": [], "continuing_subword_prefix": ""}
    saved = {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, "model": written}
    write_tokenizer(pairs / "saved again", added_tokens=[{**token, "id": 7}], **saved)
    tiny.edit_config(pairs / "theta", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    tiny.edit_config(pairs / "depth", num_hidden_layers=2)
    tiny.edit_config(pairs / "rows", vocab_size=64)
    tiny.edit_config(pairs / "rows and tokens", vocab_size=64)
    tiny.edit_config(pairs / "length", max_position_embeddings=-1)
    swapped = {**model["vocab"], "!": 1, '"': 0}
    for name in ("tokens", "rows and tokens"):
        write_tokenizer(pairs / name, model={**model, "vocab": swapped}, added_tokens=[token])
    write_tokenizer(pairs / "split", model=model, added_tokens=[token], pre_tokenizer={"type": "WhitespaceSplit"})
    write_tokenizer(pairs / "ignore_merges", model={**model, "ignore_merges": True}, added_tokens=[token])
    write_tokenizer(pairs / "single_word", model=model, added_tokens=[{**token, "single_word": True}])
    tiny.edit_config(pairs / "ids", vocab_size=60)
    (pairs / "no tokenizer" / "tokenizer.json").unlink()


def test_check_pairs(root: Path) -> None:
    make_pairs(root)
    allowed = {"chat allowed": ["--allow-added-tokens"]}
    lines = [
        ["convert", "check", str(root / "llama"), str(root / "pairs" / name), *allowed.get(name, [])] for name in PAIRS
    ]
    results = dict(zip(PAIRS, run_ranks(1, commands, lines)[0], strict=True))
    for name, (wanted, message) in PAIRS.items():
        code, out, err = results[name]
        assert code == wanted, out + err
        assert message in out
        assert len(err.splitlines()) == (1 if wanted else 0)
        assert any(line.startswith("wrong") for line in out.splitlines()) == bool(wanted), out
    assert "rope_theta" not in results["same"][1], "nothing to say of what is the same"
    assert '"<|im_end|>" becomes ["' in results["chat"][1], "a text and its two splits"
    assert "--allow-added-tokens accepts that" in results["chat"][1]
    assert '"#$" becomes ["#" 2, "$" 3] in one and ["#$" 60] in the other' in results["ignore_merges"][1]


def test_an_export_says_what_it_left(tmp_path: Path) -> None:
    """One of each: what is copied, weights, prose, hidden files, and what a model of others may need."""
    copied = ("config.json", "generation_config.json", *FILES)
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth")
    for name in (*copied, *weights, "README.md", "LICENSE.txt", ".gitattributes", "tokenization_own.py", "tekken.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "additional_chat_templates").mkdir()
    assert left_behind(tmp_path) == ["additional_chat_templates/", "tekken.json", "tokenization_own.py"]


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_shard_size_is_a_number_above_0(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    from remit_megatron.cli import main

    assert main(["convert", "export", "none", "new", "--like", "none", f"--max-shard-gb={size}"]) == 2
    assert f"--max-shard-gb {size}: a number above 0" in capsys.readouterr().err
