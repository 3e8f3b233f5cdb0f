"""The job script on this machine, with stand-ins for SLURM's commands that know one job of one rank."""

import os
import subprocess
import sys
from pathlib import Path

from launch.profiles import Profile
from launch.render import header, render, settings
from launch.status import read_events
from remit_megatron.config import dump_toml, parse_recipe
from tests.train import runs

STAND_INS = {
    "srun": """
        while [[ $1 == --* ]]; do
            [[ $1 != --output=* ]] || exec > "${1#*=}" 2>&1
            shift
        done
        exec "$@"
    """,
    "scontrol": """
        echo "$*" >> "$CALLS"
        case $* in
            "show hostnames"*) echo n0 ;;
            *"show node n0") echo "NodeName=n0 NodeAddr=127.0.0.1" ;;
            *"show job"*) echo "JobState=RUNNING Restarts=0 ExcNodeList=(null)" ;;
        esac
    """,
    "getent": "exit 2",
}


def test_a_profiles_preflight_timeout_s(tmp_path: Path) -> None:
    """A check hangs, as a look at a dead network filesystem does: its node is named and excluded after that time."""
    programs, run, job = tmp_path / "bin", tmp_path / "run", os.getpid()
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    hanging = "import shutil, signal\nshutil.disk_usage = lambda _: signal.pause()\nsignal.alarm(60)  # at the latest\n"
    (programs / "sitecustomize.py").write_text(hanging)
    (run / "logs").mkdir(parents=True)
    (run / "recipe.toml").write_text(dump_toml(parse_recipe(runs.settings(tmp_path, "run"))))
    profile = Profile(preflight_timeout_s=2)
    values = settings(profile, run, sys.executable, tmp_path)
    (run / "job.sbatch").write_text(render("train.sbatch", header(profile, run, "run", 1, 1, tmp_path), values))
    slurm = {
        "JOB_ID": str(job),
        "JOB_NUM_NODES": "1",
        "JOB_NODELIST": "n0",
        "PROCID": "0",
        "NTASKS": "1",
        "LOCALID": "0",
    }
    environment = {
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "CALLS": str(tmp_path / "calls"),
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": str(programs),
        "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(["bash", run / "job.sbatch"], env=environment, capture_output=True, text=True, timeout=90)
    assert result.returncode == 87, result.stderr
    said = (run / "logs" / f"{job}.0" / "preflight.log").read_text()
    assert said == "remit: preflight: n0: rank 0's checks do not end within 2 s\n"
    assert [(event.name, event.detail) for event in read_events(run)] == [
        ("start", "on n0"),
        ("requeue", "preflight: n0"),
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-3:] == [f"requeue {job}", f"-o show job {job}", f"update JobId={job} ExcNodeList=n0"]
