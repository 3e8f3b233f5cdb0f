"""Jobs whose ranks torchrun starts."""

import os
import signal

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import has_pending
from tests.slurm.outcome import NewRun, Undisturbed, check_done


def test_torchrun(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """Agents lose the ranks' exit code; the job reads from status.json that they saved, and goes on."""
    run = new_run()
    job = run.submit(profile={"launcher": "torchrun"})
    run.wait_for_step(3)
    with run.paused(job) as ranks:
        assert len(ranks) == 2
        cluster.run("scancel", "--signal=USR1", "--batch", job)
        run.wait(lambda: all(has_pending(pid, signal.SIGUSR1) for pid in ranks), "the ranks got no signal")
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    assert run.names() == ["start", "requeue", "start", "end"]
    logs = {path.name for path in (run.folder / "logs" / f"{job}.1").iterdir()}
    assert logs == {"agent-0.log", "agent-1.log", "rank-0.log", "rank-1.log", "srun.log"}
    check_done(run, undisturbed(2))


def test_torchrun_with_a_killed_rank(new_run: NewRun, cluster: Cluster, undisturbed: Undisturbed) -> None:
    """Only the agent's log says that a rank was killed, as one is that takes too much memory: the job goes on."""
    run = new_run()
    job = run.submit(profile={"launcher": "torchrun"})
    run.wait_for_step(9)
    with run.paused(job) as ranks:
        os.kill(ranks[0], signal.SIGKILL)
    end = run.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), run.story()
    assert run.names() == ["start", "requeue", "start", "end"]
    assert run.events[1].detail.startswith("a rank was killed by signal 9, see ")
    assert run.events[2].step == run.events[1].step >= 8
    check_done(run, undisturbed(2))
