"""Job scripts: what is filled in arrives as it was given, and the rest is the template's."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.backends import open_backend
from launch.backends.base import Launch
from launch.backends.slurm.queue import kept
from launch.backends.slurm.script import TEMPLATES, check_paths, header, render, tasks_per_node, values
from launch.backends.slurm.settings import SlurmSettings
from launch.profiles import Profile
from launch.record import end_of, read_events
from launch.status import report
from remit_megatron.config import parse_recipe
from remit_megatron.errors import UserError
from tests.train.runs import settings

SCRIPTS = [*sorted(TEMPLATES.glob("*.sbatch")), TEMPLATES / "chain.sh"]
NASTY = '/data/it\'s 100% "mine" $(touch /oops) `x` \\n;'


def launch_of(run: Path, workdir: Path, **more: Any) -> Launch:
    recipe = parse_recipe(settings(run.parent, "run"))
    return Launch(recipe=recipe, run=run, workdir=workdir, **more)


def script_of(profile: Profile, slurm: SlurmSettings, run: Path, workdir: Path, nproc: int | None = None) -> str:
    launch = launch_of(run, workdir, nodes=2, nproc=nproc)
    options = header(profile, slurm, launch, tasks_per_node(profile, slurm, nproc))
    return render("train.sbatch", options, values(profile, slurm, launch, "/venv/bin/python"), slurm.modules)


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_options() -> None:
    shipped = open_backend("slurm:gpu")
    slurm = shipped.settings.model_copy(update={"sbatch": ("--constraint=h100",), "memory": "0", "qos": "high"})
    assert options_of(script_of(shipped.profile, slurm, Path("/shared/runs/first"), Path("/home/me"))) == [
        "--job-name=remit-first",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--mem=0",
        "--partition=gpu",
        "--account=my-project",
        "--qos=high",
        "--time=24:00:00",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--chdir=/home/me",
        "--output=/shared/runs/first/logs/%j.log",
        "--constraint=h100",
    ]


def test_the_rest_is_the_template() -> None:
    """Nobody who has read slurm/train.sbatch finds another program in the run folder."""
    script = script_of(Profile(gpus_per_node=8), SlurmSettings(), Path("/runs/a"), Path("/home"))
    template = (TEMPLATES / "train.sbatch").read_text()
    bare = [line for line in template.splitlines() if not line.startswith("#SBATCH ")]
    lines = script.splitlines()
    first, last = lines.index("#SBATCH --job-name=remit-a"), lines.index("export REMIT_FRUITLESS_RESTARTS=2")
    assert [line for line in lines[:first] + lines[last + 1 :] if line] == [line for line in bare if line]


def test_values_arrive_as_they_are(tmp_path: Path) -> None:
    """Through bash, with everything in them that bash or SLURM could take for its own."""
    profile = Profile.model_validate(
        {
            "gpus_per_node": 8,
            "container": {"image": NASTY, "mounts": ["/a:/b", NASTY]},
            "environment": {"pass": ["HF_TOKEN"], "set": {"MINE": NASTY}},
        }
    )
    launch = launch_of(Path(NASTY), Path("/job dir"))
    script = render("train.sbatch", ["--nodes=2"], values(profile, SlurmSettings(), launch, "/venv/bin/python"))
    exports = "".join(f"{line}\n" for line in script.splitlines() if line.startswith("export ") and "=" in line)
    result = subprocess.run(
        ["bash", "-c", exports + "env -0"], capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}
    )
    seen = dict(entry.split("=", 1) for entry in result.stdout.split("\0") if "=" in entry)
    assert seen["MINE"] == seen["REMIT_CONTAINER_IMAGE"] == seen["REMIT_RUN"] == NASTY
    assert seen["REMIT_RECIPE"] == f"{NASTY}/recipe.toml"
    assert seen["REMIT_CONTAINER_MOUNTS"] == f"/a:/b,{NASTY}"
    assert seen["REMIT_CONTAINER_ENV"] == "HF_TOKEN,MINE"
    assert "HF_TOKEN" not in seen


@pytest.mark.parametrize("name", ['a"b', "a\\b"])
def test_a_path_that_sbatch_cannot_read(name: str) -> None:
    for run, workdir in ((Path("/runs") / name, Path("/home")), (Path("/runs/a"), Path("/home") / name)):
        with pytest.raises(UserError, match="sbatch reads no path with a double quote or a backslash"):
            check_paths(run, workdir)


@pytest.mark.parametrize(
    ("gpus", "slurm", "nproc", "tasks"),
    [(8, SlurmSettings(), None, 8), (8, SlurmSettings(tasks_per_node=1), None, 1), (0, SlurmSettings(), 3, 3)],
)
def test_ranks_a_node(gpus: int, slurm: SlurmSettings, nproc: int | None, tasks: int) -> None:
    assert tasks_per_node(Profile(gpus_per_node=gpus), slurm, nproc) == tasks


def test_ranks_a_node_must_be_said_once() -> None:
    with pytest.raises(UserError, match="--nproc is missing"):
        tasks_per_node(Profile(), SlurmSettings(), None)
    with pytest.raises(UserError, match="the profile has 8 ranks a node"):
        tasks_per_node(Profile(gpus_per_node=8), SlurmSettings(), 4)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    checker = shutil.which("shellcheck")
    command = [checker] if checker else ["bash", "-n"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_arguments_of_train(tmp_path: Path) -> None:
    """`remit launch --fallback`: the template hands them to `remit train` as words."""
    plain = values(Profile(), SlurmSettings(), launch_of(tmp_path / "run", tmp_path), "/venv/bin/python")
    launch = launch_of(tmp_path / "run", tmp_path, arguments=("--fallback",))
    script = render("train.sbatch", ["--nodes=2"], values(Profile(), SlurmSettings(), launch, "/venv/bin/python"))
    assert "export REMIT_ARGS=--fallback\n" in script
    assert "REMIT_ARGS" not in plain


def module_lines(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What the script of a profile with two modules does for them, in a shell with these variables."""
    slurm = SlurmSettings(modules=("cuda/12.4", "it's"))
    lines = script_of(Profile(), slurm, Path("/runs/a"), Path("/home"), nproc=1).splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("export REMIT_FRUITLESS_RESTARTS="))
    own = lines[last + 1 : next(n for n, line in enumerate(lines) if line.startswith("set -u"))]
    environment = {"PATH": "/usr/bin:/bin", "MODULESHOME": str(folder), **variables}
    text = "\n".join([*own, "echo begins"])
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment)


LOADED = "got load cuda/12.4\ngot load it's\nbegins\n"


def test_modules_with_the_submitters_function(tmp_path: Path) -> None:
    result = module_lines(tmp_path, {"BASH_FUNC_module%%": "() { echo got $*\n}"})
    assert (result.returncode, result.stdout, result.stderr) == (0, LOADED, "")


def test_modules_where_the_function_has_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text("module() { echo got $*; }\n")
    result = module_lines(tmp_path, {})
    assert (result.returncode, result.stdout, result.stderr) == (0, LOADED, "")


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({}, "this node has no command module"),
        ({"BASH_FUNC_module%%": '() { [ "$2" = cuda/12.4 ]\n}'}, "it's cannot be loaded"),
        ({"BASH_FUNC_module%%": "() { false\n}"}, "cuda/12.4 cannot be loaded"),
    ],
)
def test_a_job_does_not_go_on_without_its_modules(variables: dict[str, str], why: str, tmp_path: Path) -> None:
    """It ends with 2, and `remit status` tells why; the script does not come as far as asking SLURM for anything."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "job.sbatch").write_text(
        script_of(Profile(), SlurmSettings(modules=("cuda/12.4", "it's")), run, tmp_path, nproc=1)
    )
    (run / "recipe.toml").touch()
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n0"}
    environment = {"PATH": "/usr/bin:/bin", "MODULESHOME": str(tmp_path), **job, **variables}
    result = subprocess.run(["bash", run / "job.sbatch"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2, result.stderr
    failure = f"the start failed: modules of the profile: {why}, see {run}/logs/5.log (exit code 2)"
    assert report(run).splitlines()[1:3] == [f"state       ended: {failure}", "job         5.0 end"]
    assert end_of(["5"], read_events(run)) == 2


def test_the_command_module_is_submitted_only_for_modules() -> None:
    of_modules = (
        "BASH_ENV",
        "BASH_FUNC_module%%",
        "BASH_FUNC_ml%%",
        "MODULESHOME",
        "LMOD_CMD",
        "__LMOD_REF_COUNT_PATH",
    )
    variables = dict.fromkeys((*of_modules, "HOME", "SBATCH_ACCOUNT", "BASH_FUNC_other%%", "MY_MODULE_KEY"), "x")
    assert kept(variables, modules=False).keys() == {"HOME", "SBATCH_ACCOUNT"}
    assert kept(variables, modules=True).keys() == {"HOME", "SBATCH_ACCOUNT", *of_modules}


def test_half_a_chain_is_taken_back(tmp_path: Path) -> None:
    """The third link is refused: the two before it are cancelled, and nothing looks submitted."""
    for name, text in (
        (
            "sbatch",
            'echo "$@" >> calls; n=$(wc -l < calls); [ $n -lt 3 ] || { echo full >&2; exit 1; }; echo "$n;east"',
        ),
        ("scancel", 'echo "$@" > cancelled'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(TEMPLATES / "chain.sh"), "4", "job.sbatch"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "full\nlink 3 of 4 was not accepted; the 2 before it are cancelled\n"
    assert (tmp_path / "cancelled").read_text() == "1 2\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 3, "and the fourth is not tried"
    assert "--dependency=afterok:2 " in (tmp_path / "calls").read_text()


# What srun 22.05 says of ranks of a step, and the code that it then returns; the last: the code of the ranks' own.
ENDS = {
    "alone": (["n1: task 1: Exited with exit code 2", "WAITED", "n0: task 0: Killed"], 137, 2),
    "several": (
        [
            *("n0: tasks 0,3: Exited with exit code 1", "n1: task 6: Exited with exit code 75"),
            *("WAITED", "n0: task 2: Killed", "n1: tasks 5,7: Killed"),
        ],
        137,
        75,
    ),
    "crashed for it": (["n0: task 0: Exited with exit code 2", "n1: task 1: Aborted"], 134, 2),
    "killed first": (["n1: task 1: Killed", "n0: task 0: Exited with exit code 1"], 137, 137),
    "dumped first": (["n1: task 1: Segmentation fault (core dumped)", "WAITED", "n0: task 0: Killed"], 139, 139),
    "hang at the end": (["WAITED", "n0: task 0: Killed"], 137, 137),
    "well": ([], 0, 0),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_code_of_ranks_that_ended_by_themselves(case: str, tmp_path: Path) -> None:
    said, returned, own = ENDS[case]
    lines = [f"srun: error: {line}" if line != "WAITED" else "srun: First task exited 4s ago" for line in said]
    (tmp_path / "srun.log").write_text("".join(f"{line}\n" for line in lines))
    function = re.search(r"^own_code\(\) .*?^}$", (TEMPLATES / "train.sbatch").read_text(), re.DOTALL | re.MULTILINE)
    assert function is not None
    script = f"set -u; logs={shlex.quote(str(tmp_path))}\n{function[0]}\nown_code {returned}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{own}\n", "")
