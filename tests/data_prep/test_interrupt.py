"""Whatever stops a run, the same command ends with the same bytes."""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import assemble, readers
from data_prep.backends import TokenizerFile
from data_prep.inputs import expand_inputs, plan_tasks
from data_prep.inspect import verify
from data_prep.parts import read_footer
from data_prep.tokenize import TokenizeSettings, tokenize
from data_prep.work import claimed
from data_prep.worker import Encoder, Job, Progress, run_task
from remit_megatron.errors import RunError, UserError
from tests import disks
from tests.data_prep.conftest import our_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Many batches, parts and checkpoints in a small corpus; forked runs inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BATCH_BYTES", 40_000)
        patch.setattr(assemble, "CHECKPOINT_BYTES", 60_000)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A plain file, a compressed one and bad lines between."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in documents]
    lines[10:10] = [b"bad\n"] * 3
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[::-1])))
    return folder


def settings(corpus: Path, tokenizer: Path, output: Path, workers: int = 1) -> TokenizeSettings:
    return TokenizeSettings(
        inputs=[str(corpus)], tokenizer=str(tokenizer), output=str(output), workers=workers, append_eod=True,
        task_bytes=20_000, part_bytes=40_000,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dirs: dict[str, Path]) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    tokenize(settings(corpus, tokenizer_dirs["olmo2"], output))
    return output


def assert_same(output: Path, undisturbed: Path) -> None:
    assert our_files(output) == our_files(undisturbed)
    for ending in (".manifest.json", ".bad.jsonl"):
        assert Path(f"{output}{ending}").read_bytes() == Path(f"{undisturbed}{ending}").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(p.name for p in undisturbed.parent.iterdir())


def child(action: Callable[[], object], delay: float | None) -> int:
    """Run in a forked process, kill -9 its whole session after `delay` seconds. Returns its exit code or -9."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            action()
            code = 0
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_kill_at_random_moments(
    tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path
) -> None:
    """20 kills of one run and of fresh ones; some hit a parent whose two workers live on for a moment."""
    what = settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data")
    start = time.monotonic()
    assert child(lambda: tokenize(what), None) == 0
    whole = time.monotonic() - start
    assert_same(tmp_path / "data", undisturbed)
    generator, kills, finished = random.Random(3), 0, 0
    while kills < 20:
        if Path(f"{tmp_path}/data.idx").exists():
            assert_same(tmp_path / "data", undisturbed)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        workers = 2 if kills % 10 == 9 else 1
        action = settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data", workers)
        ended = child(
            lambda action=action: tokenize(action), generator.uniform(0.1, 1.1) * whole * (3 if workers > 1 else 1)
        )  # type: ignore[misc]
        assert ended in (0, -9)
        kills += ended == -9
        finished += ended == 0
    time.sleep(0.2)
    tokenize(what)
    assert_same(tmp_path / "data", undisturbed)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moment", [1, 3, 9, 30, -6, -5, -4, -3, -2, -1])
def test_kill_before_each_rename(
    moment: int, older: bool, tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path
) -> None:
    """Renames are where state changes; negative moments count from the end, which is the publication."""
    what = settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data")
    if older:
        (tmp_path / "old.txt").write_text("another dataset under the same name")
        tokenize(dataclasses.replace(what, inputs=[str(tmp_path / "old.txt")]))
        (tmp_path / "old.txt").unlink()
        what = dataclasses.replace(what, overwrite=True)

    def die_at(target: int | None) -> None:
        count, real = 0, os.replace

        def replace(*arguments: object) -> None:
            nonlocal count
            count += 1
            if count == target:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)  # type: ignore[arg-type]

        os.replace = replace  # type: ignore[assignment]
        tokenize(what)
        (tmp_path / "count").write_text(str(count))

    if moment < 0:
        assert child(lambda: die_at(None), None) == 0
        moment += int((tmp_path / "count").read_text()) + 1
        (tmp_path / "count").unlink()
        if not older:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert child(lambda: die_at(moment), None) == -9
    if Path(f"{tmp_path}/data.idx").exists():  # then it is whole, be it the old or the new one
        verify(f"{tmp_path}/data", full=True)
        assert Path(f"{tmp_path}/data.manifest.json").exists()
    tokenize(what)
    assert_same(tmp_path / "data", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 KiB, less than the run needs."""
    with disks.small_disk(tmp_path / "disk", "320k") as disk:
        yield disk


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(
    workers: int, small_disk: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path
) -> None:
    what = settings(corpus, tokenizer_dirs["olmo2"], small_disk / "data", workers)
    with pytest.raises(RunError, match="No space left on device: free space there, then start the same command again"):
        tokenize(what)
    state = small_disk / "data.parts" / "state.json"
    certain = json.loads(state.read_text())["num_tokens"]
    assert certain > 0
    with pytest.raises(RunError, match="No space left"):
        tokenize(what)
    assert json.loads(state.read_text())["num_tokens"] >= certain
    assert not (small_disk / "data.idx").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    tokenize(what)
    assert_same(small_disk / "data", undisturbed)


def test_file_size_limit(tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path) -> None:
    """As a full disk or a quota, but possible without rights: the system refuses to let a file grow."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            tokenize(settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data"))
        except RunError as error:
            os._exit(7 if "cannot be written: File too large" in str(error) else 8)

    assert child(limited, None) == 7
    tokenize(settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data"))
    assert_same(tmp_path / "data", undisturbed)


def test_second_run_is_refused(tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path]) -> None:
    what = settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data")
    with claimed(what.output), pytest.raises(UserError, match="another run works on it"):
        tokenize(what)
    assert list(tmp_path.iterdir()) == []


def test_killed_worker_is_reported(
    tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path
) -> None:
    what = settings(corpus, tokenizer_dirs["olmo2"], tmp_path / "data", workers=2)
    before = set(multiprocessing.active_children())

    def kill_one() -> None:
        while not (new := set(multiprocessing.active_children()) - before):
            time.sleep(0.01)
        os.kill(new.pop().pid or 0, signal.SIGKILL)

    import threading

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RunError, match="a worker process ended with -9"):
        tokenize(what)
    killer.join()
    tokenize(what)
    assert_same(tmp_path / "data", undisturbed)


def test_interrupt_from_the_keyboard(
    tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], undisturbed: Path
) -> None:
    """The command line, stopped with Ctrl-C and with SIGTERM, then resumed by another process."""
    command = [sys.executable, "-m", "data_prep.cli", "data", "tokenize", str(corpus), "--append-eod", "--workers", "1"]
    command += ["--tokenizer", str(tokenizer_dirs["olmo2"]), "--output", str(tmp_path / "data")]
    for number, code in ((signal.SIGINT, 75), (signal.SIGTERM, -signal.SIGTERM)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while "pieces:" not in (line := process.stderr.readline()) and line:
            continue
        process.send_signal(number)
        said = process.communicate()[1]
        if process.returncode == 0:
            break  # it was done before the signal came
        assert process.returncode == code, said
        if number == signal.SIGINT:
            assert said == f"remit: {tmp_path}/data.parts: interrupted; the same command goes on from what is done\n"
    if not Path(f"{tmp_path}/data.idx").exists():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert our_files(tmp_path / "data") == our_files(undisturbed)


def test_input_that_changes_while_it_is_read(
    tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus, tmp_path / "in")
    commit, changed = assemble.Assembler.advance, []

    def advance(self: assemble.Assembler) -> None:
        commit(self)
        if self.done and not changed:
            changed.append((tmp_path / "in" / "a.jsonl").write_bytes(b'{"text": "another"}\n'))

    monkeypatch.setattr(assemble.Assembler, "advance", advance)
    with pytest.raises(UserError, match=r"a.jsonl: changed while it was read"):
        tokenize(settings(tmp_path / "in", tokenizer_dirs["olmo2"], tmp_path / "data"))
    assert not (tmp_path / "data.idx").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz"])
def test_task_goes_on_after_its_last_part(
    name: str, tmp_path: Path, corpus: Path, tokenizer_dirs: dict[str, Path]
) -> None:
    """A worker that finds some of a task's parts writes the others only, byte for byte those of one go."""
    file = TokenizerFile.load(tokenizer_dirs["olmo2"])
    job = Job(tmp_path, file, "gigatoken", file.vocab_size, 0, "text", 1 << 20, 100, part_bytes=1)
    task = plan_tasks(expand_inputs([str(corpus / name)]).inputs, 1 << 30, "text")[0]
    seen: list[Progress] = []

    def go() -> dict[str, bytes]:
        seen.clear()
        run_task(job, Encoder(job), 0, task, (0, None), seen.append)
        found = {}
        for path in sorted(tmp_path.iterdir()):
            footer = read_footer(path)
            assert footer is not None
            payload = footer.bin_bytes + 4 * footer.num_documents + footer.bad_bytes
            found[path.name] = path.read_bytes()[:payload] + str((footer.position, footer.last, footer.size)).encode()
        return found

    whole = go()
    assert len(whole) > 5
    sizes = [progress.size for progress in seen if progress.size]
    for kept in (0, 1, 4, len(whole) - 1, len(whole)):
        for part in list(whole)[kept:]:
            (tmp_path / part).unlink()
        assert go() == whole
        assert [progress.size for progress in seen if progress.size] == sizes[kept:]
