"""What does not need a training run to its end: dry runs, plain sbatch, containers, a bad node, job arrays."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.backends.slurm.settings import seconds_of
from launch.profiles import SHIPPED
from remit_megatron.config import dump_toml, parse_recipe
from tests import disks
from tests.data_prep.tokenizers import TEXTS, save
from tests.launch.test_profiles import NO_TIMES, TIMES
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import QUIET, ROOT, STEPS, Run, profile_text
from tests.test_docs import commands
from tests.train.runs import settings

pytestmark = pytest.mark.slurm

NewRun = Callable[..., Run]
ONE_RANK = {"parallel": {"tensor": 1}}
LATE_S = 20
"""Longer than one interpreter may start after another on a slow machine."""


def test_dry_run(new_run: NewRun, tmp_path: Path) -> None:
    """Prints the script and SLURM's opinion of it, and writes nothing."""
    run = new_run()
    said = run.launch("--dry-run")
    assert said.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2\n" in said.stdout
    assert f"using 2 processors on nodes n[{2 * run.pair}-{2 * run.pair + 1}]" in said.stderr
    refused = run.launch("--dry-run", nodes=9, expect=2)
    assert "SLURM would refuse this job" in refused.stderr
    assert refused.stderr.count("\n") == 2, "SLURM's own line and ours"
    empty = tmp_path / "slurm.conf"
    empty.touch()
    unheard = run.launch("--dry-run", variables={"SLURM_CONF": str(empty)}, expect=1)
    assert unheard.stderr.endswith("out of reach, so it has not judged the job: dry-run on a login node\n")
    assert not run.folder.exists()


def test_a_time_limit_is_to_slurm_what_it_is_here(cluster: Cluster, pair: int) -> None:
    """In whole minutes, upwards; and of those that are refused here SLURM reads only some that nobody can mean."""
    held = ["sbatch", "--parsable", "--hold", "-p", f"pair{pair}", "--output=/dev/null", "--wrap=true"]
    for text, seconds in TIMES.items():
        job = cluster.ask(*held, f"--time={text}")
        said = cluster.job(job)["TimeLimit"]
        cluster.run("scancel", job)
        assert seconds_of(said) == 60 * -(-seconds // 60), text
    for text in NO_TIMES:
        command = [*held, "--test-only", f"--time={text}"]
        accepted = subprocess.run(command, env=cluster.environment, capture_output=True).returncode == 0
        assert accepted == (text in ("0", "00:00:00", "-5", "1-")), text


def test_a_refused_submission_is_one_line(new_run: NewRun) -> None:
    run = new_run()
    refused = run.launch(profile={"partition": "nowhere"}, expect=2)
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(f"remit: SLURM refuses {run.folder}/job.sbatch: ")
    assert "invalid partition specified: nowhere" in line


def test_the_pages_first_run(pair: int, cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """docs/clusters.md, line by line, in a folder of an odd name and with a recipe of relative paths."""
    folder = tmp_path / "it's 100%j of #1"
    shutil.copytree(data, folder / "data")
    recipe = settings(Path("data"), "first", parallel={"tensor": 2}, evaluation={"every_steps": 0, "samples": 2})
    (folder / "recipe.toml").write_text(dump_toml(parse_recipe(recipe | {"run": "runs/first"})))
    shipped = tomllib.loads((SHIPPED / "loopback.toml").read_text())
    shipped["slurm"] |= {"partition": f"pair{pair}", "tasks_per_node": 1, "shared_folders": [str(tmp_path)]}
    (folder / "cluster.toml").write_text(profile_text(shipped))
    said = []
    for words in commands("docs/clusters.md"):
        if words[0] != ".venv/bin/remit":
            continue
        command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *words[1:]]
        result = subprocess.run(
            command, cwd=folder, env={**cluster.environment, **QUIET}, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{words}: {result.stderr}"
        said.append(result.stdout)
    assert len(said) == 5
    _, dry, followed, status, again = said
    assert "#SBATCH --nodes=2" in dry
    assert "runs/first: done" in followed
    assert "state       done" in status
    assert len((folder / "runs" / "first" / "metrics.jsonl").read_text().splitlines()) == 12
    job = again.partition(": job ")[2].split()[0]
    cluster.wait(lambda: cluster.ended(job), "the second job did not end")
    assert "the run is done already" in (folder / "runs" / "first" / "logs" / f"{job}.log").read_text()


def test_by_hand(new_run: NewRun, cluster: Cluster) -> None:
    """Plain sbatch, as the template's first lines say; and what happens to one who creates no log folder."""
    run = new_run(**ONE_RANK)
    variables = {"REMIT_RECIPE": run.recipe, "REMIT_RUN": run.folder, "REMIT_PYTHON": sys.executable}
    environment = {**cluster.environment, **QUIET, **{name: str(value) for name, value in variables.items()}}
    environment["GLOO_SOCKET_IFNAME"] = "lo"

    def submit() -> dict[str, str]:
        command = ["sbatch", "--parsable", "-p", f"pair{run.pair}", f"--output={run.folder}/logs/%j.log"]
        result = subprocess.run(
            [*command, "slurm/train.sbatch"], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return run.wait_for_end(result.stdout.strip())

    end = submit()
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "0:53"), "SLURM says this, and not a word more"
    assert not run.folder.exists()
    (run.folder / "logs").mkdir(parents=True)
    end = submit()
    assert end["JobState"] == "COMPLETED", run.story()
    assert (run.folder / "DONE").exists()
    assert "1 ranks: devices" in (run.folder / "logs" / f"{end['JobId']}.0" / "preflight.log").read_text()


def test_containers(new_run: NewRun, cluster: Cluster) -> None:
    """Image, mounts, folder and the names of variables reach every step through the options of pyxis."""
    run = new_run()
    container = {"image": "registry/remit:1", "mounts": ["/a:/a", "/b:/c:ro"]}
    profile = {
        "container": container,
        "python": sys.executable,
        "environment": {"pass": ["REMIT_TEST_KEY"], "set": {"GLOO_SOCKET_IFNAME": "lo"}},
    }
    job = run.submit(profile=profile, variables={"REMIT_TEST_KEY": "x"})
    run.wait(lambda: len(run.ranks(job)) == 2, "no ranks")
    seen = [environment_of(pid) for pid in run.ranks(job)]
    cluster.run("scancel", job)
    for variables in seen:
        assert variables["STUB_CONTAINER_IMAGE"] == "registry/remit:1"
        assert variables["STUB_CONTAINER_MOUNTS"] == "/a:/a,/b:/c:ro"
        assert variables["STUB_CONTAINER_WORKDIR"] == str(ROOT)
        assert variables["STUB_CONTAINER_NAME"] == f"remit-{job}"
        assert variables["STUB_CONTAINER_ENV"].split(",") == [
            *("MASTER_ADDR", "MASTER_PORT", "REMIT_TEST_KEY", "GLOO_SOCKET_IFNAME", "PYTHONWARNINGS")
        ]
        assert variables["REMIT_TEST_KEY"] == "x"
        assert variables["MASTER_ADDR"] == "127.0.0.1"
    run.wait_for_end(job)


def test_a_module_that_cannot_be_loaded(new_run: NewRun, cluster: Cluster) -> None:
    """The job ends before its first step, and the run folder tells why."""
    run = new_run(**ONE_RANK)
    variables = {"BASH_FUNC_module%%": "() { echo no such module: $2 >&2; false\n}"}
    followed = run.launch("--follow", nodes=1, profile={"modules": ["cuda/1"]}, variables=variables, expect=2).stdout
    job = run.events[0].start.partition(".")[0]
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExitCode"]) == ("FAILED", "2:0")
    why = f"modules of the profile: cuda/1 cannot be loaded, see {run.folder}/logs/{job}.log"
    assert f"state       ended: the start failed: {why} (exit code 2)\n" in followed
    assert "no such module: cuda/1\n" in (run.folder / "logs" / f"{job}.log").read_text()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a megabyte."""
    with disks.small_disk(tmp_path / "full", "1m") as disk:
        yield disk


def test_a_bad_node_is_named_and_excluded(new_run: NewRun, cluster: Cluster, full_disk: Path) -> None:
    """The first node's TMPDIR is full: its preflight says so, and the run takes the other node."""
    run = new_run(**ONE_RANK)
    bad, good = f"n{2 * run.pair}", f"n{2 * run.pair + 1}"
    with cluster.node_setting(bad, "TMPDIR", str(full_disk)):
        job = run.submit(nodes=1, profile={"preflight": True})
        end = run.wait_for_end(job)
    assert end["JobState"] == "COMPLETED", run.story()
    assert end["ExcNodeList"] == bad
    assert [(event.name, event.detail) for event in run.events] == [
        ("start", f"on {bad}"),
        ("requeue", f"preflight: {bad}"),
        ("start", f"on {good}"),
        ("end", "done (exit code 0)"),
    ]
    said = (run.folder / "logs" / f"{job}.0" / "preflight.log").read_text()
    assert said == f"remit: preflight: {bad}: {full_disk} has 1 MB left\n"


def test_a_check_that_hangs(new_run: NewRun, cluster: Cluster, tmp_path: Path) -> None:
    """On the second node, as a look at a dead network filesystem does: it is excluded after preflight_timeout_s."""
    run = new_run()
    bad = f"n{2 * run.pair + 1}"
    (tmp_path / "sitecustomize.py").write_text("import shutil, signal\nshutil.disk_usage = lambda _: signal.pause()\n")
    with cluster.node_setting(bad, "PYTHONPATH", str(tmp_path)):
        job = run.submit(profile={"preflight": True, "preflight_timeout_s": LATE_S})
        run.wait(lambda: cluster.job(job)["ExcNodeList"] == bad, "the node was not excluded", timeout_s=300)
    cluster.run("scancel", job)  # it would wait for a second sound node
    assert [(event.name, event.detail) for event in run.events] == [
        ("start", f"on n[{2 * run.pair}-{2 * run.pair + 1}]"),
        ("requeue", f"preflight: {bad}"),
    ]
    said = (run.folder / "logs" / f"{job}.0" / "preflight.log").read_text()
    assert said == f"remit: preflight: {bad}: rank 1's checks do not end within {LATE_S} s\n"


def test_a_full_run_folder_ends_the_job(new_run: NewRun, cluster: Cluster, full_disk: Path) -> None:
    """No other node has more room in it, so the job does not come back."""
    run = new_run(**ONE_RANK)
    (full_disk / "filler").write_bytes(bytes(900_000))
    job = run.submit("--set", f'run="{full_disk / "run"}"', nodes=1, profile={"preflight": True})
    end = run.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "0")
    log = (full_disk / "run" / "logs" / f"{job}.log").read_text()
    assert "GB are free" in log, log


def test_a_disk_without_a_free_byte_ends_the_job(new_run: NewRun, cluster: Cluster, full_disk: Path) -> None:
    """Without its records nobody would count the restarts."""
    run = new_run(**ONE_RANK)
    folder = full_disk / "run"
    job = run.submit("--set", f'run="{folder}"', nodes=1, profile={"preflight": True, "sbatch": ["--hold"]})
    with contextlib.suppress(OSError), (full_disk / "filler").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    cluster.run("scontrol", "release", job)
    end = run.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "0")
    assert list((folder / "logs" / f"{job}.0").iterdir()) == [], "not even the preflight was started"


def test_tokenize_array(pair: int, cluster: Cluster, tmp_path: Path) -> None:
    """An array of two shards and a merge give the bytes of one run without shards."""
    save("gpt2", tmp_path / "tokenizer")
    lines = [json.dumps({"text": TEXTS[n % len(TEXTS)] * (n % 5 + 1)}) for n in range(400)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(lines[:150]) + "\n")
    (tmp_path / "raw" / "b.jsonl").write_text("\n".join(lines[150:]) + "\n")
    (tmp_path / "logs").mkdir()
    remit = Path(sys.executable).with_name("remit")
    variables = {"INPUT": str(tmp_path / "raw" / "*.jsonl"), "TOKENIZER": str(tmp_path / "tokenizer")}
    variables |= {"OUTPUT": str(tmp_path / "corpus"), "REMIT": str(remit), **QUIET}
    environment = {**cluster.environment, **variables}

    def sbatch(*options: str) -> str:
        command = ["sbatch", "--parsable", "-p", f"pair{pair}", "--cpus-per-task=1", *options]
        script = str(ROOT / "slurm" / "tokenize.sbatch")
        result = subprocess.run([*command, script], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    array = sbatch("--array=0-1")
    merge = sbatch(f"--dependency=afterok:{array}", "--export=ALL,MERGE=2")
    cluster.wait(lambda: cluster.ended(merge), "the merge did not end")
    logs = "\n".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    assert cluster.job(merge)["JobState"] == "COMPLETED", logs
    whole = [str(remit), "data", "tokenize", variables["INPUT"], "--tokenizer", variables["TOKENIZER"]]
    subprocess.run([*whole, "--output", str(tmp_path / "whole"), "--append-eod", "--workers", "1"], check=True)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"corpus{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()

    wrong = sbatch("--array=1-2")
    cluster.wait(lambda: cluster.ended(wrong), "the array did not end")
    said = (tmp_path / "logs" / f"tokenize-{wrong}-1.log").read_text()
    assert said == "--array must be 0-(N-1), it begins at 1\n"


def test_score_array(
    new_run: NewRun, cluster: Cluster, data: Path, tmp_path: Path, undisturbed: Callable[[int], Any], shared: Path
) -> None:
    """Two shards on two ranks each, side by side, give the bytes of one local run."""
    undisturbed(2)
    sources = [{"path": str(data / name)} for name in ("train", "held")]
    reference = {"path": str(shared / "undisturbed-2")}
    run = new_run(objective={"name": "remit"}, reference=reference, data={"train": sources}, nproc=2)
    (tmp_path / "logs").mkdir()
    variables = {"REMIT_RECIPE": str(run.recipe), "REMIT_SCORES": str(tmp_path / "scores")}
    variables |= {"REMIT_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", **QUIET}
    command = ["sbatch", "--parsable", "-p", f"pair{run.pair}", "--array=0-1", "--ntasks-per-node=2"]
    array = subprocess.run(
        [*command, str(ROOT / "slurm" / "score.sbatch")],
        env={**cluster.environment, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    local = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "score", str(run.recipe), "--nproc", "2"]
    subprocess.run([*local, "--output", str(tmp_path / "local")], env={**os.environ, **QUIET}, check=True)
    cluster.wait(lambda: not cluster.ask("squeue", "-h", "-j", array, check=False), "the array did not end")
    logs = "\n".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    theirs, ours = files(tmp_path / "scores"), files(tmp_path / "local")
    assert theirs.keys() == ours.keys(), logs
    assert sum(name.endswith(".scores") for name in ours) >= 2, list(ours)
    assert theirs == ours
    assert f"{tmp_path / 'scores'}: complete" in logs


def test_scorer_beside_a_run(
    new_run: NewRun, cluster: Cluster, tmp_path: Path, undisturbed: Callable[[int], Any], shared: Path
) -> None:
    """The scorer is a job of its own: the run has every step's scores from it, and it ends when the run does."""
    undisturbed(2)
    reference = {
        "path": str(shared / "undisturbed-2"),
        "queue": {"fallback": "stop", "timeout_s": 300.0, "parallel": {}},
    }
    run = new_run(objective={"name": "remit"}, reference=reference, nproc=2)
    variables = {"REMIT_RECIPE": str(run.recipe), "REMIT_RUN": str(run.folder), "REMIT_PYTHON": sys.executable}
    command = [
        "sbatch",
        "--parsable",
        "-p",
        f"pair{run.pair}",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/scorer.log",
    ]
    scorer = subprocess.run(
        [*command, str(ROOT / "slurm" / "score.sbatch")],
        env={**cluster.environment, **variables, "GLOO_SOCKET_IFNAME": "lo", **QUIET},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    job = run.submit(nodes=1)
    assert run.wait_for_end(job)["JobState"] == "COMPLETED", run.story()
    cluster.wait(lambda: cluster.ended(scorer), "the scorer did not end")
    assert cluster.job(scorer)["JobState"] == "COMPLETED", (tmp_path / "scorer.log").read_text()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert {line["scored_online"] for line in lines} == {0}


def test_a_scorer_with_a_mistake(
    new_run: NewRun, cluster: Cluster, tmp_path: Path, undisturbed: Callable[[int], Any], shared: Path
) -> None:
    """Of one rank: the others are ended, and the job's code is that rank's, not theirs."""
    undisturbed(2)
    run = new_run(objective={"name": "remit"}, reference={"path": str(shared / "undisturbed-2"), "queue": {}})
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(2)\n")
    variables = {"REMIT_RECIPE": str(run.recipe), "REMIT_RUN": str(run.folder), "REMIT_PYTHON": sys.executable}
    command = ["sbatch", "--parsable", "-p", f"pair{run.pair}", "--nodes=2", f"--output={tmp_path}/scorer.log"]
    with cluster.node_setting(f"n{2 * run.pair + 1}", "PYTHONPATH", str(tmp_path)):
        scorer = subprocess.run(
            [*command, str(ROOT / "slurm" / "score.sbatch")],
            env={**cluster.environment, **variables, "GLOO_SOCKET_IFNAME": "lo", **QUIET},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        cluster.wait(lambda: cluster.ended(scorer), "the scorer did not end")
    said = (tmp_path / "scorer.log").read_text()
    assert (cluster.job(scorer)["JobState"], cluster.job(scorer)["ExitCode"]) == ("FAILED", "2:0"), said
    assert "task 0: Killed" in said or "task 0: Terminated" in said, "whose code would be 137 or 143"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "."
    }


def environment_of(pid: int) -> dict[str, str]:
    entries = (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
