"""Training jobs on a real SLURM: submitted with `remit launch`, interrupted as clusters do it, and read afterwards.

Node names of this cluster resolve nowhere, as on some real ones, so every run also shows that ranks meet all the same.
"""

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.status import report
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, Run, batch_script, has_pending, recipe_text
from tests.slurm.outcome import NewRun, Undisturbed, check_done

pytestmark = pytest.mark.slurm


def test_from_submission_to_done(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """Two nodes of two ranks, followed, with a preflight, modules, and a secret that no file tells."""
    run, secret = new_run(nproc=2), secrets.token_hex(16)
    resolved = subprocess.run(["getent", "hosts", f"n{2 * run.pair}"])
    assert resolved.returncode != 0, "node names resolve here, so that this shows nothing about those that do not"
    profile: dict[str, Any] = {"preflight": True, "modules": ["cuda/12.4"]}
    profile["environment"] = {"pass": ["REMIT_TEST_KEY"], "set": {"GLOO_SOCKET_IFNAME": "lo"}}
    variables = {"REMIT_TEST_KEY": secret, "UNRELATED_PASSWORD": secret}
    variables["BASH_FUNC_module%%"] = "() { echo the command module was called to $*\n}"
    said = run.launch("--follow", profile=profile, variables=variables).stdout
    check_done(run, undisturbed(4))
    assert run.names() == ["start", "end"]

    job = run.events[0].start
    assert sorted(path.name for path in (run.folder / "logs" / job).iterdir()) == [
        "preflight.log",
        *(f"rank-{n}.log" for n in range(4)),
        "srun.log",
    ]
    assert (
        "4 ranks: devices, disk, clock and all-reduce are well"
        in (run.folder / "logs" / job / "preflight.log").read_text()
    )
    assert f"{STEPS} of {STEPS} (100.0%)" in said, "--follow ends with the report"
    assert f"{run.folder}: done" in said, "--follow shows rank 0's log"
    assert said.count("the command module was called to load cuda/12.4\n") == 1, "the submitter's, in the job's shell"
    assert {"recipe.toml", "job.sbatch", "code.json", "code.diff", "environment.txt"} <= {
        path.name for path in run.folder.iterdir()
    }

    accounting = subprocess.run(["sacct"], env=cluster.environment, capture_output=True)
    assert accounting.returncode != 0, "status needs no accounting: there is none here"
    assert "restarts    0" in report(run.folder)

    assert secret not in said
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_time_limit(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """SLURM's signal ahead of the limit: all ranks save, the job queues itself again and goes on to the end."""
    run = new_run(nproc=2)
    job = run.submit(profile={"signal_lead_s": 150})
    run.wait_for_step(3)
    with run.paused(job) as ranks:
        assert len(ranks) == 4
        hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
        # SLURM looks twice a minute, and now finds that the signal is due.
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
        run.wait(lambda: all(has_pending(pid, signal.SIGUSR1) for pid in ranks), "SLURM sent no signal")
    run.wait(lambda: cluster.job(job)["JobState"] == "PENDING", "the job did not queue itself again")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert run.names() == ["start", "requeue", "start", "end"]
    assert run.events[1].detail == "time limit"
    assert 3 <= run.events[1].step < STEPS, "the stop saved a checkpoint"
    assert f"{job}.1 from step {run.events[1].step}: time limit" in report(run.folder)
    check_done(run, undisturbed(4))


def test_preemption(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """A job of a higher partition takes the nodes; ranks save and end within the grace; the run comes back."""
    run = new_run()
    job = run.submit()
    run.wait_for_step(3)
    with run.paused(job):
        urgent = submit_urgent(cluster, run.pair)
        run.wait(lambda: cluster.job(job)["PreemptTime"] != "None", "SLURM did not preempt")
    end = run.wait_for_end(job)
    run.wait(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job did not run")
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    assert run.names() == ["start", "preempted", "requeue", "start", "end"], run.story()
    assert 3 <= run.events[2].step < STEPS
    check_done(run, undisturbed(2))


def test_preemption_without_grace(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """SLURM's default: it queues the job again by itself, at once, and the run goes on from what was saved before."""
    run = new_run()
    job = run.submit(profile={"partition": f"abrupt{run.pair}", "fruitless_restarts": 0})
    run.wait_for_step(9)
    urgent = submit_urgent(cluster, run.pair)
    end = run.wait_for_end(job)
    run.wait(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job did not run")
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    # SLURM kills the script ten seconds later: on a slow machine it is the next start that says so.
    assert run.names() in (["start", name, "start", "end"] for name in ("preempted", "requeue")), run.story()
    assert run.events[1].detail == "SLURM has queued the job again"
    check_done(run, undisturbed(2))


def test_a_job_cancelled_within_the_grace_stays_dead(new_run: NewRun, cluster: Cluster) -> None:
    run = new_run()
    job = run.submit()
    run.wait_for_step(3)
    script = batch_script(job)
    os.kill(script, signal.SIGSTOP)
    try:
        urgent = submit_urgent(cluster, run.pair)
        run.wait(lambda: not run.ranks(job), "the ranks did not save and end")
        assert cluster.job(job)["PreemptTime"] != "None"
        cluster.run("scancel", job)
    finally:
        os.kill(script, signal.SIGCONT)
    run.wait(lambda: cluster.ended(urgent), "the urgent job did not run")
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert "requeue" not in run.names()
    assert run.status["state"] == "stopped"


@pytest.mark.parametrize(("which", "late"), [(0, False), (1, False), (1, True)], ids=["first", "other", "late"])
def test_lost_node(
    which: int,
    late: bool,
    new_run: NewRun,
    cluster: Cluster,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node goes with everything on it, the job script too if it is the first: the run goes on when it is back.

    Ranks, the script and SLURM notice it in any order, and the node may be back before the script asks for it (late).
    """
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    run = new_run()
    # SLURM repeats the kill that the lost node did not hear, and may hit a later start: one restart more.
    job = run.submit(profile={"exit_wait_s": 4, "fruitless_restarts": 5})
    run.wait_for_step(9)
    node, script = f"n{2 * run.pair + which}", batch_script(job)
    with run.paused(job):
        saved = run.saved()
        cluster.lose_node(node, job)
        if late:
            os.kill(script, signal.SIGSTOP)
    run.wait(lambda: cluster.job(job)["JobState"] == "PENDING", "the job did not come back to the queue")
    cluster.wait(lambda: "down" in cluster.states(), "SLURM did not miss the node")
    if not which:  # nobody could tell the run folder
        assert "state       waits to start again; it had last said: running" in report(run.folder)
    cluster.start_node(node)
    if late:
        cluster.wait(lambda: "down" not in cluster.states(), "the node is not back")
        with contextlib.suppress(ProcessLookupError):  # SLURM may have killed it by now
            os.kill(script, signal.SIGCONT)
    end = run.wait_for_end(job)
    assert end["JobState"] == "COMPLETED"
    starts = [event for event in run.events if event.name == "start"]
    assert [event.step for event in starts[:2]] == [-1, saved], "from the newest checkpoint"
    assert f"lost {node}" in report(run.folder), run.story()
    check_done(run, undisturbed(2))


@pytest.mark.parametrize("code", [2, 1])
def test_a_rank_that_fails_alone(code: int, new_run: NewRun, cluster: Cluster, tmp_path: Path) -> None:
    """While the other hangs, and is killed `exit_wait_s` later: its code counts, though SLURM returns the highest."""
    run = new_run()
    says = f"import os\nos.write(2, b'remit: it is like that here\\n')\nos._exit({code})\n"
    (tmp_path / "sitecustomize.py").write_text(says)
    with cluster.node_setting(f"n{2 * run.pair + 1}", "PYTHONPATH", str(tmp_path)):
        job = run.submit(profile={"exit_wait_s": 5})
        end = run.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{code}:0", "0"), run.story()
    assert run.names() == ["start", "end"], run.story()
    logs = run.folder / "logs" / f"{job}.0"
    what = "a mistake in recipe or input" if code == 2 else "failed"
    assert run.events[-1].detail == f"{what}: it is like that here, in {logs}/rank-1.log (exit code {code})"
    said = (logs / "srun.log").read_text()
    assert "First task exited 5s ago" in said, "and is not killed at once, as this site does by default"
    assert said in (run.folder / "logs" / f"{job}.log").read_text()


def test_a_job_that_is_killed(new_run: NewRun, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its script, so that status.json says for ever that it runs: `remit status` asks SLURM."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    run = new_run(nproc=2)
    job = run.submit(nodes=1)
    run.wait_for_step(3)
    with run.paused(job) as ranks:
        assert "state       running\n" in report(run.folder)
        # All at once, as a node's memory guard does it: scancel's KILL asks the ranks to stop first, and they save.
        for pid in (batch_script(job), *ranks):
            os.kill(pid, signal.SIGKILL)
    run.wait_for_end(job)
    assert run.status["state"] == "running"
    state = next(line for line in report(run.folder).splitlines() if line.startswith("state "))
    assert state == "state       ended without a last word: killed, or its node was lost; it had last said: running"


def test_chain(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """The first link ends at its limit, the second goes on to the end, the third finds the run done."""
    run = new_run()
    jobs = run.jobs("--chain", "3")
    run.wait_for_step(3)
    with run.paused(jobs[0]) as ranks:
        cluster.run("scancel", "--signal=USR1", "--batch", jobs[0])  # the signal of the time limit, as SLURM sends it
        run.wait(lambda: all(has_pending(pid, signal.SIGUSR1) for pid in ranks), "the ranks got no signal")
    run.wait_for_end(jobs[2])
    assert [cluster.job(job)["JobState"] for job in jobs] == ["COMPLETED"] * 3
    assert [(event.start, event.detail) for event in run.events if event.name == "end"] == [
        (f"{jobs[0]}.0", "time limit: link 1/3 hands over (exit code 0)"),
        (f"{jobs[1]}.0", "done (exit code 0)"),
        (f"{jobs[2]}.0", "the run is done already (exit code 0)"),
    ]
    check_done(run, undisturbed(2))


def test_a_failing_link_ends_the_chain(new_run: NewRun, cluster: Cluster) -> None:
    """No rank gets as far as a status: what one said is told all the same, with its log, and their code comes back."""
    run = new_run(nproc=2, data={"train": [{"path": "/nowhere/corpus"}]})
    followed = run.launch("--chain", "3", "--follow", nodes=1, expect=2).stdout
    jobs = followed.partition(": job ")[2].partition(" submitted")[0].split(", ")
    assert [cluster.job(job)["JobState"] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert run.names() == ["start", "end"], run.story()
    state = next(line for line in report(run.folder).splitlines() if line.startswith("state "))
    assert state.startswith("state       ended: a mistake in recipe or input: /nowhere/corpus.idx: no such file")
    log = state.rpartition(", in ")[2].removesuffix(" (exit code 2)")
    assert "remit: /nowhere/corpus.idx: no such file" in Path(log).read_text()


def test_crash_loop_ends(new_run: NewRun, cluster: Cluster) -> None:
    """Ranks that are killed before any checkpoint get two more starts, and no third."""
    run = new_run()
    job = run.submit()

    def kill_and_look() -> bool:
        for pid in run.ranks(job)[:1]:
            os.kill(pid, signal.SIGKILL)
        return cluster.ended(job)

    run.wait(kill_and_look, "the job did not give up")
    assert cluster.job(job)["JobState"] == "FAILED"
    assert cluster.job(job)["ExitCode"] == "1:0"
    assert run.names() == ["start", "requeue"] * 2 + ["start", "end"], run.story()
    assert "killed by signal 9" in run.events[-2].detail or "killed by signal 9" in run.events[-1].detail
    assert (run.status["state"], run.status["exit_code"]) == ("failed", 1)
    assert run.status["reason"].startswith("no new checkpoint in 2 restarts")
    assert "no new checkpoint in 2 restarts" in report(run.folder)


def test_a_hang(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """One rank stands still for good: the other says so, with its stacks, and the job starts again."""
    run = new_run(watchdog={"step_timeout_s": 20})
    job = run.submit(profile={"exit_wait_s": 5})
    run.wait_for_step(9)
    os.kill(run.ranks(job)[1], signal.SIGSTOP)
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    assert run.names() == ["start", "requeue", "start", "end"]
    assert run.events[1].detail.startswith("hang, see ")
    assert run.events[2].step == run.events[1].step >= 8
    stacks = [log.read_text() for log in (run.folder / "logs" / f"{job}.0").glob("rank-*.log")]
    assert any("most recent call first" in text for text in stacks), run.story()
    check_done(run, undisturbed(2))


def test_two_jobs_on_one_run_folder(new_run: NewRun, cluster: Cluster) -> None:
    """The second is refused while the first trains; the first, cancelled, saves and stays dead."""
    run = new_run(nproc=2)
    first = run.submit(nodes=1)
    run.wait_for_step(3)
    with run.paused(first):
        second = run.submit(nodes=1)
        end = run.wait_for_end(second)
        assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0")
        said = (run.folder / "logs" / f"{second}.log").read_text()
        assert said == f"remit: REMIT_RUN = '{run.folder}' is being trained by job {first}: wait for it or cancel it\n"
        cluster.run("scancel", first)
    end = run.wait_for_end(first)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert "requeue" not in run.names()
    assert run.status["state"] == "stopped", run.story()


@pytest.fixture
def own_cluster(shared: Path) -> Iterator[Cluster]:
    """One whose controller a test may take away from it, and from nobody else."""
    # A question that nobody answers takes twice the timeout.
    cluster = Cluster(shared / "own-slurm", first_job=1_000_000, message_timeout_s=5)
    try:
        cluster.root.mkdir()
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def test_a_controller_that_is_away(own_cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """At the time limit nobody answers the job: it asks again, and goes on when the controller is back.

    It goes when the step has ended: SLURM's own record of that, if it fails, is tried again only after a minute.
    """
    run = Run(own_cluster, tmp_path / "run", pair=0)
    run.recipe.write_text(recipe_text(data, run.folder, parallel={"tensor": 1}))
    job = run.submit(nodes=1)
    run.wait_for_step(3)
    with run.paused(job) as ranks:
        own_cluster.run("scancel", "--signal=USR1", "--batch", job)
        run.wait(lambda: all(has_pending(pid, signal.SIGUSR1) for pid in ranks), "the rank got no signal")
        script = batch_script(job)
        os.kill(script, signal.SIGSTOP)
    try:
        run.wait(lambda: f"{job}.0" not in own_cluster.ask("squeue", "-h", "-s", "-o", "%i"), "the step did not end")
        stack = contextlib.ExitStack()
        stack.enter_context(own_cluster.no_controller())
    finally:
        os.kill(script, signal.SIGCONT)
    with stack:
        asked: set[int] = set()

        def insists_or_is_over() -> bool:
            asked.update(questions(job))
            # One question of a job that does not insist could be lost without harm, but never the next one too.
            return len(asked) > 2 or run.names()[-1] == "end"

        run.wait(insists_or_is_over, "the job did not ask again")
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    assert run.names() == ["start", "requeue", "start", "end"]
    assert run.events[1].detail == "time limit"
    assert (run.folder / "DONE").read_text() == f"step {STEPS}\n"


def submit_urgent(cluster: Cluster, pair: int) -> str:
    command = ["sbatch", "--parsable", "-p", f"urgent{pair}", "--nodes=2", "--exclusive", "--output=/dev/null"]
    return cluster.ask(*command, "--wrap", "sleep 1")


def questions(job: str) -> set[int]:
    """Process ids of what the job's script now asks the controller with."""
    wanted, found = f"SLURM_JOB_ID={job}".encode(), set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            asks = entry.name.isdigit() and (entry / "comm").read_text() == "scontrol\n"
            if asks and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found
