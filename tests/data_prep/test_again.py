"""The same command again, damaged work and two at once: the same bytes, or one line that says what to do."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import assemble, readers
from data_prep.backends import TokenizerFile
from data_prep.inputs import expand_inputs, plan_tasks
from data_prep.merge import merge
from data_prep.parts import is_whole, read_footer
from data_prep.select import select
from data_prep.tokenize import TokenizeSettings, tokenize
from data_prep.worker import Encoder, Job, run_task
from data_prep.writer import write_dataset
from remit_megatron.data.manifest import Manifest
from remit_megatron.errors import RunError, UserError
from tests.data_prep.conftest import our_files


@pytest.fixture
def what(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> TokenizeSettings:
    monkeypatch.setattr(readers, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(assemble, "CHECKPOINT_BYTES", 20_000)
    lines = [json.dumps({"text": text}) + "\n" for text in documents[:150]]
    (tmp_path / "in.jsonl").write_text("".join([*lines, "bad\n"]))
    (tmp_path / "out").mkdir(exist_ok=True)
    return TokenizeSettings(
        inputs=[str(tmp_path / "in.jsonl")], tokenizer=str(tokenizer_dirs["olmo2"]), output=str(tmp_path / "out" / "d"),
        workers=1, append_eod=True, task_bytes=20_000, part_bytes=20_000, backend="tokenizers",
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_fork(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except UserError as error:
            code = 2 if "another run works on it" in str(error) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(action: Callable[[], object], folder: Path, ending: str) -> Callable[[], object]:
    """The action, which dies before it renames something to that ending in the folder."""

    def go() -> None:
        real = os.replace

        def replace(source: object, target: object) -> None:
            path = Path(str(target))
            if path.parent == folder and path.name.endswith(ending):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)  # type: ignore[arg-type]

        os.replace = replace  # type: ignore[assignment]
        action()

    return go


PUBLISHED = (".bin", ".manifest.json", ".idx", ".tmp")
"""What a publication renames to, in order; the last is the work folder, moved aside to be deleted."""


def check_again(action: Callable[[], object], folder: Path, endings: tuple[str, ...] = PUBLISHED) -> None:
    """Killed before each rename of its publication, and when done: it ends well, with the same files and no other."""
    action()
    undisturbed = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    action()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times, "done is done"
    for ending in endings:
        shutil.rmtree(folder)
        folder.mkdir()
        assert in_a_fork(killed_before(action, folder, ending)) == -signal.SIGKILL, ending
        action()
        assert contents(folder) == undisturbed, ending


def test_tokenize_again(what: TokenizeSettings) -> None:
    check_again(lambda: tokenize(what), Path(what.output).parent, (".bad.jsonl", *PUBLISHED))
    for change in (dict(append_eod=False), dict(text_key="id"), dict(vocab_size=5000), dict(max_document_mib=1)):
        with pytest.raises(UserError, match="exists already"):
            tokenize(dataclasses.replace(what, **change))  # type: ignore[arg-type]
    made = Manifest.read(what.output)
    assert made is not None
    assert made.tokenizer_hash is not None
    before = made.tokenizer_hash.split("-")[2] + "0" * 48  # as earlier versions knew the tokenizer
    made.model_copy(update={"tokenizer_hash": before}).write(what.output)
    assert tokenize(what).tokenizer_hash == before
    made.model_copy(update={"tokenizer_hash": "f" * 64}).write(what.output)
    with pytest.raises(UserError, match="exists already"):
        tokenize(what)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [[1, 2, 3], [4] * 30, [5, 6], [7]], vocab_size=20, eod_id=9, tokenizer_hash="aa")
    for name, scores in (("l", [0.0, 1, 2, 3]), ("s", [3.0, 1, 0, 9])):
        np.save(tmp_path / f"{name}.npy", scores)
    (tmp_path / "out").mkdir(exist_ok=True)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_merge_and_select_again(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_again(lambda: merge(sources, str(out / "d")), out)
    with pytest.raises(UserError, match="exists already"):
        merge(sources[::-1][:1], str(out / "d"))
    scores = {"large": tmp_path / "l.npy", "small": tmp_path / "s.npy"}
    shutil.rmtree(out)
    out.mkdir()
    check_again(lambda: select(sources[0], **scores, output=str(out / "d")), out, (".select.json", *PUBLISHED))
    (out / "d.select.json").unlink()  # as older versions left it, which wrote it last
    report = select(sources[0], **scores, output=str(out / "d"))
    assert json.loads((out / "d.select.json").read_text()) == report
    with pytest.raises(UserError, match="exists already"):
        select(sources[0], **scores, keep=0.5, output=str(out / "d"))


def test_what_another_command_did_not_publish(sources: list[str], tmp_path: Path, what: TokenizeSettings) -> None:
    """It is neither taken for this command's nor deleted; nor are the tokens of an unfinished tokenization."""
    out = tmp_path / "out"
    assert in_a_fork(killed_before(lambda: merge(sources, str(out / "d")), out, ".idx")) == -signal.SIGKILL
    for action in (lambda: merge(sources[:1], str(out / "d")), lambda: tokenize(what)):
        with pytest.raises(UserError, match="holds what another command has made and did not publish"):
            action()
    merge(sources, str(out / "d"))
    stopping = dataclasses.replace(what, output=str(out / "t"), max_bad=0)
    with pytest.raises(UserError, match="--max-bad allows 0"):
        tokenize(stopping)
    with pytest.raises(UserError, match="belongs to an unfinished `remit data tokenize`"):
        merge(sources, str(out / "t"))
    assert tokenize(dataclasses.replace(stopping, max_bad=1)).num_documents == 150


def stop_after_the_plan(what: TokenizeSettings, monkeypatch: pytest.MonkeyPatch) -> Path:
    def stop(*_: object) -> None:
        raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.tokenize._run", stop)
        with pytest.raises(RunError, match="stopped"):
            tokenize(what)
    return Path(f"{what.output}.parts")


def test_damaged_parts_are_made_again(
    what: TokenizeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit of the tokens, of the trailer and of the footer, and a part cut short."""
    tokenize(what)
    undisturbed = our_files(Path(what.output))
    what = dataclasses.replace(what, output=what.output + "2")
    folder = stop_after_the_plan(what, monkeypatch)
    file = TokenizerFile.load(what.tokenizer)
    job = Job(folder, file, "tokenizers", file.vocab_size, 0, "text", 64 << 20, 1000, part_bytes=20_000)
    for number, task in enumerate(plan_tasks(expand_inputs(what.inputs).inputs, 20_000, "text")[:4]):
        run_task(job, Encoder(job), number, task, (0, None), lambda progress: None)
    parts = sorted(folder.glob("*.part"))[:4]
    for part, place in zip(parts, (1000, -1, -30, None), strict=True):
        assert is_whole(part)
        content = bytearray(part.read_bytes())
        if place is None:
            del content[-100:]
        else:
            content[place] ^= 1
        part.write_bytes(content)
        assert not is_whole(part)
    assert read_footer(parts[0]) is not None, "its footer is sound, its tokens are not"
    tokenize(what)
    said = capsys.readouterr().err
    assert all(f"{part}: damaged, or of another version: made again" in said for part in parts)
    assert our_files(Path(what.output)) == undisturbed


def test_what_is_done_is_checked_when_it_goes_on(what: TokenizeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed bit of the output that grows, of its lengths or of the journal."""
    real = assemble.Assembler.checkpoint

    def checkpoint(self: assemble.Assembler) -> None:
        real(self)
        raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(assemble.Assembler, "checkpoint", checkpoint)
        with pytest.raises(RunError, match="stopped"):
            tokenize(what)
    folder = Path(f"{what.output}.parts")
    for name in ("all.bin", "all.len", "state.json", "plan.json"):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound[:30] + bytes([sound[30] ^ 1]) + sound[31:])
        with pytest.raises((RunError, UserError), match=r"(has changed on the disk|json: .*); delete the folder"):
            tokenize(what)
        (folder / name).write_bytes(sound)
    assert tokenize(what).num_documents == 150


def test_two_at_once(what: TokenizeSettings) -> None:
    """One makes the dataset; the others say that it is being made, or find it made."""
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(max(0, in_a_fork(lambda: tokenize(what))))
        pids.append(pid)
    codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    assert 0 in codes
    assert codes <= {0, 2}
    out = Path(what.output).parent
    assert {path.name for path in out.iterdir()} == {"d.bin", "d.idx", "d.manifest.json", "d.bad.jsonl"}
