"""Text from outside: read, or refused in one short line that names the file."""

import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from remit_megatron import toml
from remit_megatron.cli import main
from remit_megatron.config import parse_recipe
from remit_megatron.data.indexed import open_index
from remit_megatron.errors import UserError
from remit_megatron.outside import MAX_DEPTH, impossible_name, quote, read_bytes, read_json, read_model, read_object


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    steps: int
    inner: dict[str, int] = {}


REFUSED = {
    "cut": (b'{"steps": 1', "no valid JSON"),
    "no UTF-8": (b'{"steps": "\xff"}', "no UTF-8 at byte 11"),
    "half a character": (rb'{"steps": "\ud800"}', "half of a surrogate pair"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, "nested deeper than"),
    "deep objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
    "long number": (b'{"steps": ' + b"9" * 5000 + b"}", "no valid JSON: Exceeds the limit"),
    "a list": (b"[1]", r"no JSON object but \[1\]"),
    "a key of another type": (
        b'{"steps": "' + b"x" * 5000 + b'"}',
        r"steps: Input should be a valid integer \(got xxx",
    ),
    "inside": (b'{"steps": 1, "inner": {"a\\nb": 1.5}}', r"inner.a\\nb: Input should be a valid integer"),
    "an unknown key": (b'{"steps": 1, "' + b"y" * 5000 + b'": 2}', "yyy.*: Extra inputs"),
    "a missing key": (b"{}", "steps: Field required"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_model(path, Record, "make it again")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; make it again")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 400


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"steps": 7, "inner": {"a": 1}}', encoding="utf-8")
    assert read_model(path, Record, "") == Record(steps=7, inner={"a": 1})
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    path.write_text(deepest)
    assert str(read_json(path)) == deepest
    path.write_text('{"a": NaN, "b": "\\ud83d\\ude00 \\u00e9"}')
    assert read_object(path)["b"] == "\U0001f600 \u00e9"


def test_paths(tmp_path: Path) -> None:
    """What is no file is named, and never waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name, message in (
        ("none", "no such file"),
        ("pipe", "no regular file"),
        ("", "a folder"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("a" * 256, "cannot be read: File name too long"),
        ("a\0b", r"a\\x00b: cannot be read: embedded null"),
        ("large", "more than 10 bytes"),
        ("large/file", "cannot be read: Not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            read_bytes(tmp_path / name, "record", limit=10)


def test_names_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a recipe, whichever key it is; and on a command line."""
    recipe = {"run": "r", "data": {"train": [{"path": "a/" + "b" * 256}], "eval": {}}}
    assert impossible_name(recipe) == ("data.train.0.path", "a/" + "b" * 256)
    assert impossible_name({"run": "a" * 255, "text": ["\u6f22" * 85, 3]}) is None
    for text in ("\u6f22" * 86, "a/\0"):
        with pytest.raises(UserError, match=r"recipe: run = .* has a NUL, or a name of more than 255 bytes"):
            parse_recipe({"run": text})
    with pytest.raises(UserError, match="no such file; a dataset is a PREFIX"):
        open_index(tmp_path / ("c" * 256))
    for command in (["data", "verify", "c" * 256], ["convert", "check", "d" * 256, "e"], ["status", "f" * 256]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("remit: ")
        assert said.count("\n") == 1


def test_an_error_is_one_line() -> None:
    assert str(UserError("a.parquet: no file: type: \x0f\nsecond\ud800 \u00e9\n")) == (
        "a.parquet: no file: type: \\x0f\\nsecond\\ud800 \u00e9"
    )


def test_quote() -> None:
    assert quote("a\nb\x00\ud800\u00e9") == "a\\nb\\x00\\ud800\u00e9"
    assert quote("x" * 300) == "x" * 197 + "..."
    assert quote({"a": 1}) == "{'a': 1}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deep"),
        (".".join("a" * 200) + " = 1", "nested too deep"),
        ("a = " + "9" * 5000, "Exceeds the limit"),
        ("a = 1\na = 2", "Cannot overwrite"),
        ("\x00", "Invalid statement"),
    ],
)
def test_toml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"recipe {path}: no valid TOML: .*{message}"):
        toml.read(path, "recipe")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.init=", "no value; an empty text is written init="),
        ("a=1\nb=2", "sets 2 keys"),
        ("a=x\nb=2", r"--set a=x\\nb=2: no valid TOML value"),
        ("a=" + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("a=[" + "x" * 5000, "no valid TOML value"),
    ],
)
def test_override(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        toml.override({}, assignment)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_an_empty_text_can_be_asked_for() -> None:
    settings: dict[str, object] = {}
    toml.override(settings, "model.init=''")
    assert settings == {"model": {"init": ""}}
