"""The run folder before the job: what it holds, what it keeps, and where it may be."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import run_folder
from launch.backends.docker import docker_command
from launch.profiles import Profile
from remit_megatron.cli import main
from remit_megatron.config import Recipe, dump_toml, load_recipe, parse_recipe
from remit_megatron.errors import UserError
from tests.train.runs import make_data, metrics, settings


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(settings(tmp_path, "run"))


def test_what_it_holds(recipe: Recipe) -> None:
    run = Path(recipe.run)
    run_folder.prepare(run, recipe)
    assert load_recipe(run / "recipe.toml") == recipe
    assert (run / "logs").is_dir()
    code = json.loads((run / "code.json").read_text())
    assert (Path(code["path"]) / "remit_megatron" / "cli.py").exists()
    assert any(line.startswith("megatron-core==0.16") for line in (run / "environment.txt").read_text().splitlines())


def test_code_that_changed_since(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout with a commit, then an edit, then another commit: the folder tells them apart and keeps the first."""
    root, run = tmp_path / "checkout", Path(recipe.run)
    (root / "remit_megatron").mkdir(parents=True)
    source = root / "remit_megatron" / "__init__.py"
    monkeypatch.setattr(run_folder.remit_megatron, "__file__", str(source))
    source.write_text("one = 1\n")

    def git(*arguments: str) -> str:
        names = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, env={**os.environ, **names}, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    first = git("rev-parse", "HEAD")
    assert run_folder.prepare(run, recipe) == []
    assert (run / "code.diff").read_bytes() == b""
    source.write_text("one = 2\n")
    assert run_folder.prepare(run, recipe) == [f"the code has changes that no commit has: {run / 'code.diff'}"]
    assert "+one = 2" in (run / "code.diff").read_text()
    git("commit", "-qam", "two")
    second = git("rev-parse", "HEAD")
    assert run_folder.prepare(run, recipe) == [f"the run was begun with commit {first}, and goes on with {second}"]
    assert json.loads((run / "code.json").read_text())["commit"] == second
    (before,) = run.glob("code.*.json")
    assert json.loads(before.read_text())["commit"] == first


@pytest.mark.parametrize(
    "text", ["", "[]", '{"launched_unix_s": "now"}', '{"commit": 5}', '{"launched_unix_s": 1e300}']
)
def test_a_damaged_code_file_is_written_anew(text: str, recipe: Recipe) -> None:
    run = Path(recipe.run)
    run.mkdir(parents=True)
    (run / "code.json").write_text(text)
    remark = run_folder.prepare(run, recipe)[0]
    assert remark.startswith(f"{run}/code.json: is damaged: ")
    assert remark.endswith("; it is written anew")
    assert "version" in json.loads((run / "code.json").read_text())


def test_a_folder_that_nodes_do_not_share() -> None:
    for run in ("/tmp/run", "/dev/shm/run", "/var/tmp/a/run"):
        with pytest.raises(UserError, match=r"which 2 nodes do not share"):
            run_folder.check_shared(Path(run), 2, ())
        run_folder.check_shared(Path(run), 1, ())
        run_folder.check_shared(Path(run), 2, ("/tmp", "/dev/shm", "/var/tmp"))


def test_local(tmp_path: Path) -> None:
    """On this machine: the folder is made first, and the ranks train in it; a path with a blank and a quote."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    make_data(folder)
    path = folder / "my recipe.toml"
    path.write_text(dump_toml(parse_recipe(settings(folder, 'a "run"', evaluation={"every_steps": 0, "samples": 2}))))
    command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "launch", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment)
    assert planned.returncode == 0
    assert "--nproc 1" in planned.stdout
    assert not (folder / 'a "run"').exists()
    started = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    assert metrics(folder, 'a "run"')[-1]["step"] == 12
    assert {"code.json", "DONE", "logs", "status.json"} <= {p.name for p in (folder / 'a "run"').iterdir()}


def engine(folder: Path, name: str) -> Path:
    """A program in the place of a container engine, that writes down what it was called with."""
    folder.mkdir()
    script = folder / name
    script.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/called\nprintf "%s" "$HF_TOKEN" > {folder}/token\nexit 75\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_container_on_this_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets every mount and name, no value of a secret, and its exit code is ours."""
    bin_folder = engine(tmp_path / "bin", name)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'gpus_per_node = 4\n[container]\nimage = "remit:2"\nmounts = ["/data:/data:ro"]\n'
        '[environment]\npass = ["HF_TOKEN"]\nset = { NCCL_DEBUG = "INFO" }\n'
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "my run"))))
    assert main(["launch", str(recipe), "--on", f"docker:{profile}"]) == 75
    called, run = (bin_folder / "called").read_text().splitlines(), tmp_path / "my run"
    assert called[:2] == ["run", "--rm"]
    for argument in (f"--volume={run}:{run}", "--volume=/data:/data:ro", "--env=NCCL_DEBUG=INFO", "--env=HF_TOKEN"):
        assert argument in called
    assert ("--gpus=all" in called) == (name == "docker")
    assert ("--device=nvidia.com/gpu=all" in called) == (name == "podman")
    words = ["remit:2", "remit", "train", f"{run}/recipe.toml", "--set", f"run={run}", "--nproc", "4"]
    assert called[-8:] == words
    assert "a-secret" not in "\n".join(called)
    assert (bin_folder / "token").read_text() == "a-secret"


def test_signals_reach_the_container(tmp_path: Path) -> None:
    """The engine's client hears each of them and `remit launch` outlives it: its exit code comes back."""
    bin_folder = engine(tmp_path / "bin", "docker")
    heard = bin_folder / "heard"
    names = ("USR1", "INT", "TERM")
    traps = "".join(f"trap 'echo {name} >> {heard}' {name}\n" for name in names)
    wait = f"touch {heard}\nwhile [ $(wc -l < {heard}) -lt 3 ]; do sleep 0.05; done\nexit 75\n"
    (bin_folder / "docker").write_text(f"#!/bin/sh\n{traps}{wait}")
    profile = tmp_path / "mine.toml"
    profile.write_text('gpus_per_node = 1\n[container]\nimage = "remit:2"\n')
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "launch", str(recipe)]
    launched = subprocess.Popen(
        [*command, "--on", f"docker:{profile}"],
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        # Where the tests run in the background of a script it is ignored, and a shell cannot trap it then.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        wait_for(heard.exists, launched)
        for count, name in enumerate(names, 1):
            launched.send_signal(getattr(signal, f"SIG{name}"))
            wait_for(lambda n=count: len(heard.read_text().split()) == n, launched)  # type: ignore[misc]
        assert launched.wait(60) == 75
    finally:
        launched.kill()
        with heard.open("a") as stream:  # so that a client that was left alone ends as well
            stream.write("\n" * 3)
    assert heard.read_text().split() == list(names)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, f"remit launch ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_with_a_colon_is_no_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bin_folder = engine(tmp_path / "bin", "docker")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "a:b"))))
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    assert main(["launch", str(recipe), "--on", "docker"]) == 2
    assert f"{tmp_path}/a:b: a mount reads no path with a colon" in capsys.readouterr().err
    assert not (tmp_path / "a:b").exists()


def test_no_container_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="neither docker nor podman is on this machine"):
        docker_command(["train"], tmp_path, tmp_path, Profile(), 1)
