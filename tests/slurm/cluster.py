"""A real SLURM on 127.0.0.1: a controller, several virtual nodes with fake GPUs, munge. No systemd, no cgroups.

Nodes come in pairs, so that tests run side by side: partition `pair0` has n0 and n1, `pair1` n2 and n3, and so on.
`urgent0` has the nodes of `pair0`, and preempts it. So does it `abrupt0`, whose jobs get no time to save.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PAIRS = 3
NODES = [f"n{i}" for i in range(2 * PAIRS)]
CPUS, GPUS = 8, 2
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "gcc")
SPANK_HEADER = Path("/usr/include/slurm/spank.h")
SOURCE = Path(__file__).parent / "container_stub.c"


def missing() -> list[str]:
    """What this machine lacks to bring a cluster up."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    lacking += [] if SPANK_HEADER.exists() else [str(SPANK_HEADER)]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """`root`: an empty folder for its configuration, state and logs.

    Processes are told apart by the ids of their jobs: a second cluster counts from another `first_job`.
    """

    def __init__(self, root: Path, first_job: int = 1, message_timeout_s: int = 30):
        self.root, self.first_job, self.message_timeout_s = root, first_job, message_timeout_s
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "REMIT_"))},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(root / "etc" / "slurm.conf"),
        }

    # Up and down.

    def up(self) -> None:
        for name in ("state", "log", "munge", "socket", "etc", "dev", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = self.root / "munge"
        self.run(
            *("munged", "--force", "--num-threads=2", f"--socket={self.root}/socket/munge.sock", f"--key-file={key}"),
            *(f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log", f"--seed-file={munge}/seed"),
        )
        for i in range(GPUS):  # a clone of /dev/null: SLURM counts it and sets CUDA_VISIBLE_DEVICES
            os.mknod(self.root / "dev" / f"gpu{i}", 0o666 | 0o020000, os.makedev(1, 3))
        etc, stub = self.root / "etc", self.root / "container_stub.so"
        self.run("gcc", "-shared", "-fPIC", "-o", str(stub), str(SOURCE))
        (etc / "plugstack.conf").write_text(f"required {stub}\n")
        (etc / "gres.conf").write_text(f"Name=gpu File={self.root}/dev/gpu[0-{GPUS - 1}]\n")
        (etc / "task-prolog.sh").write_text(f'#!/bin/sh\ncat "{etc}/tasks-$SLURMD_NODENAME" 2> /dev/null || true\n')
        (etc / "task-prolog.sh").chmod(0o755)
        (etc / "slurm.conf").write_text(self._configuration())
        self.run("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.states().count("idle") == len(NODES), "the nodes did not become idle")

    def _configuration(self) -> str:
        root, host = self.root, socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(NODES))
        lines = [
            "ClusterName=loopback",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # A requeued job waits until the credentials of its last start have expired: two minutes by default.
            f"AuthInfo=socket={root}/socket/munge.sock,cred_expire=5",
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            f"TaskProlog={root}/etc/task-prolog.sh",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000",
            f"StateSaveLocation={root}/state",
            f"SlurmdSpoolDir={root}/spool-%n",
            f"SlurmctldPidFile={root}/slurmctld.pid",
            f"SlurmdPidFile={root}/slurmd-%n.pid",
            f"SlurmctldLogFile={root}/log/slurmctld.log",
            f"SlurmdLogFile={root}/log/slurmd-%n.log",
            "SlurmdParameters=config_overrides",
            "SlurmdTimeout=25",
            "KillWait=10",
            "KillOnBadExit=1",  # as some sites have it
            f"MessageTimeout={self.message_timeout_s}",
            "MinJobAge=3600",
            f"FirstJobId={self.first_job}",
            "ReturnToService=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "GresTypes=gpu",
        ]
        for node, port in zip(NODES, ports[1:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Sockets=1 "
                f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            )
        for i in range(PAIRS):
            nodes = f"Nodes=n[{2 * i}-{2 * i + 1}] MaxTime=INFINITE State=UP"
            lines.append(f"PartitionName=pair{i} {nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=60")
            lines.append(f"PartitionName=abrupt{i} {nodes} PriorityTier=1 PreemptMode=REQUEUE")
            lines.append(f"PartitionName=urgent{i} {nodes} PriorityTier=10 PreemptMode=OFF")
        return "\n".join(lines) + "\n"

    def down(self) -> None:
        """Cancel what runs, and end the daemons by the process ids that they have written."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self.ask("squeue", "-h", "-o", "%i", check=False):
            time.sleep(0.2)
        files = [*(self.root / f"slurmd-{node}.pid" for node in NODES), self.root / "slurmctld.pid"]
        _end(*files)
        _end(self.root / "munge" / "munged.pid")

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    @contextlib.contextmanager
    def no_controller(self) -> Iterator[None]:
        """Its daemon is away, and comes back with what it knew."""
        _end(self.root / "slurmctld.pid")
        try:
            yield
        finally:
            self.run("slurmctld")

    @contextlib.contextmanager
    def node_setting(self, node: str, name: str, value: str) -> Iterator[None]:
        """A variable that the tasks of one node get from its prolog, as sites set TMPDIR."""
        file = self.root / "etc" / f"tasks-{node}"
        file.write_text(f"export {name}={value}\n")
        try:
            yield
        finally:
            file.unlink()

    def revive(self, pair: int) -> None:
        """Start the daemons of lost nodes again."""
        for node in NODES[2 * pair : 2 * pair + 2]:
            pid = (self.root / f"slurmd-{node}.pid").read_text().strip()
            if not Path(f"/proc/{pid}").exists():
                self.start_node(node)

    def lose_node(self, node: str, job: str) -> None:
        """As when its power goes: the node's daemon and everything of the job on it, at once."""
        ours = [f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()]
        processes = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and all(v in (entry / "environ").read_bytes().split(b"\0") for v in ours):
                    processes.append(int(entry.name))
            except OSError:
                continue
        _end(self.root / f"slurmd-{node}.pid", number=signal.SIGKILL)
        parents = {_parent(pid) for pid in processes}
        steps = {pid for pid in parents if _command(pid) == "slurmstepd"}
        for pid in [*steps, *processes]:
            os.kill(pid, signal.SIGKILL)

    # What it is asked.

    def run(self, *command: str) -> None:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"

    def ask(self, *command: str, check: bool = True) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def states(self) -> list[str]:
        pairs = ",".join(f"pair{i}" for i in range(PAIRS))
        return [state.rstrip("*") for state in self.ask("sinfo", "-h", "-N", "-p", pairs, "-o", "%T").split()]

    def idle(self, pair: int) -> bool:
        return self.ask("sinfo", "-h", "-N", "-p", f"pair{pair}", "-o", "%T").split() == ["idle", "idle"]

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.ask("scontrol", "-o", "show", "job", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def ended(self, job: str) -> bool:
        return self.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")

    def wait(self, condition: Callable[[], Any], otherwise: str, timeout_s: float = 1800) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}; logs in {self.root / 'log'}"
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _end(*files: Path, number: int = signal.SIGTERM) -> None:
    """Signal the daemons whose ids are in `files`, as far as they still are daemons of ours, and wait for their end."""
    pids = []
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            if _command(pid) in ("slurmd", "slurmctld", "munged"):
                os.kill(pid, number)
                pids.append(pid)
    _wait_for_end(pids)


def _wait_for_end(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
