"""Cluster profiles: the shipped ones load, and a wrong one is one line, exit code 2, and nothing written."""

import re
from pathlib import Path

import pytest

from launch.backends import open_backend
from launch.backends.slurm.settings import SlurmSettings, seconds_of
from launch.profiles import OURS, shipped
from remit_megatron.cli import main
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.errors import UserError
from tests.train.runs import make_data, settings


def test_shipped_profiles_load() -> None:
    assert shipped() == ["gpu", "loopback", "pyxis"]
    for name in shipped():
        assert open_backend(f"slurm:{name}").settings.partition
    container = open_backend("slurm:pyxis").profile.container
    assert container is not None
    assert container.image.endswith(".sqsh")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[slurm]\npartitoin = 'x'", "unknown key slurm.partitoin, did you mean partition?"),
        ("partitoin = 'x'", "unknown key slurm.partitoin, did you mean partition?"),
        ("[slrum]\npartition = 'x'", "unknown key slrum, did you mean slurm?"),
        ("slurm = 'gpu'", "slurm: Input should be a valid dictionary"),
        ("partition = 'x'\n[slurm]\npartition = 'y'", "partition stands at the top and in [slurm]"),
        ("[container]\nimage = 'x'\nmount = []", "unknown key container.mount, did you mean mounts?"),
        ("[container]\nmounts = []", "missing key container.image"),
        ("[environment]\nexport = ['A']", "unknown key environment.export, did you mean"),
        ("[environment]\npass = ['A B']", "environment.pass.0: String should match pattern"),
        ("[environment.set]\nHF_TOKEN = 'abc'", "environment.set.HF_TOKEN looks like a secret"),
        ('[slurm]\npartition = "x\\n#SBATCH --nodes=9"', "slurm.partition: String should match pattern"),
        ("[slurm]\nsbatch = ['nodes=9']", "slurm.sbatch.0: String should match pattern"),
        ("gpus_per_node = '8'", "gpus_per_node: Input should be a valid integer (got '8')"),
        ("[slurm]\nsignal_lead_s = 3", "slurm.signal_lead_s: Input should be greater than or equal to 10 (got 3)"),
        ("launcher = 'mpi'", "slurm.launcher: Input should be 'srun' or 'torchrun' (got 'mpi')"),
        ("partition = ", "no valid TOML"),
    ],
)
def test_a_wrong_profile_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        open_backend(f"slurm:{path}")
    assert f"{path}" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "abc" not in str(error.value), "a secret is not repeated"


@pytest.mark.parametrize("where", ["pass", "set"])
def test_what_a_job_tells_its_ranks_is_not_the_profiles_to_set(where: str, tmp_path: Path) -> None:
    """Neither which recipe is trained nor which rank one is."""
    path = tmp_path / "mine.toml"
    for name in ("REMIT_RECIPE", "RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        path.write_text(f"[environment]\n{where} = " + (f"['{name}']" if where == "pass" else f"{{ {name} = '1' }}"))
        with pytest.raises(UserError, match=rf"environment.{where} has {name}, by which ranks are told .*: remove it"):
            open_backend(f"docker:{path}")
    path.write_text("[environment.set]\nREMIT_ASK_S = '9'\nSLURM_MPI_TYPE = 'none'\nNCCL_RANK_HINT = '1'")
    assert len(open_backend(f"slurm:{path}").profile.environment.set) == 3


def test_every_variable_between_job_and_ranks_is_known() -> None:
    """Those that the job scripts and this package read: all but the one that docs/clusters.md offers to users."""
    root = Path(__file__).parents[2]
    files = [*root.glob("slurm/*.sbatch"), *root.glob("slurm/*.sh"), *root.glob("launch/**/*.py")]
    read = {name for file in files for name in re.findall(r"\bREMIT_[A-Z_]+[A-Z]\b", file.read_text())}
    assert {"REMIT_RUN", "REMIT_LOGS", "REMIT_CONTAINER_MOUNTS", "REMIT_SCORES"} <= read
    assert {name for name in read if not OURS.fullmatch(name)} == {"REMIT_ASK_S"}


def test_a_profile_without_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As profiles were written once: it says the same, and a word tells how it is written."""
    flat, sectioned = tmp_path / "flat.toml", tmp_path / "sectioned.toml"
    flat.write_text("partition = 'a'\ngpus_per_node = 4\nsbatch = ['-C h100']\n[environment]\npass = ['KEY']\n")
    sectioned.write_text(
        "gpus_per_node = 4\n[slurm]\npartition = 'a'\nsbatch = ['-C h100']\n[environment]\npass = ['KEY']\n"
    )
    old = open_backend(f"slurm:{flat}")
    assert capsys.readouterr().err == f"remit: profile {flat}: write partition, sbatch under a line [slurm]\n"
    new = open_backend(f"slurm:{sectioned}")
    assert capsys.readouterr().err == ""
    assert (old.profile, old.settings) == (new.profile, new.settings)


def test_a_mount_with_a_comma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pyxis would make two mounts of it; Docker, which gets each by itself, does not."""
    make_data(tmp_path)
    recipe, profile = tmp_path / "recipe.toml", tmp_path / "mine.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    profile.write_text("[container]\nimage = 'x'\nmounts = ['/a:/a', '/b,c:/d:ro']\n[slurm]\nshared_folders = ['/']")
    assert main(["launch", str(recipe), "--on", f"slurm:{profile}", "--nproc", "1"]) == 2
    assert "container.mounts of the profile: '/b,c:/d:ro' has a comma, at which pyxis cuts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# tests/slurm asks sbatch about all of them.
NO_TIMES = ["", "0", "00:00:00", "soon", "24h", "-5", "1:2:3:4", "1-", "-1:00", "1-2-3", "1.5", "\u0663"]
TIMES = {
    **{"10": 600, "90:30": 5430, "1:00:00": 3600, "24:00:00": 86_400, "2-0": 172_800, "2-06": 194_400},
    **{"1-12:30": 131_400, "1-00:00:10": 86_410, "007": 420},
}


@pytest.mark.parametrize("text", TIMES)
def test_a_time_limit(text: str) -> None:
    assert seconds_of(text) == TIMES[text]
    assert SlurmSettings(time_limit=text, signal_lead_s=10).time_limit == text
    assert SlurmSettings(time_limit="unlimited").time_limit == "unlimited"


@pytest.mark.parametrize(
    "text", ["", "0", "00:00:00", "soon", "24h", "-5", "1:2:3:4", "1-", "-1:00", "1-2-3", "1.5", "٣"]
)
def test_a_time_limit_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[slurm]\ntime_limit = '{text}'\n")
    with pytest.raises(UserError, match=r"slurm.time_limit: is no time limit: write minutes, .*\(got '") as error:
        open_backend(f"slurm:{path}")
    assert "\n" not in str(error.value)


def test_a_time_limit_that_is_over_before_ranks_are_asked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[slurm]\ntime_limit = '5'\n")
    with pytest.raises(
        UserError, match="slurm: time_limit = '5' is 300 s, and ranks are asked to stop 300 s before it"
    ):
        open_backend(f"slurm:{path}")


def test_what_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[environment.set]\nTOKENIZERS_PARALLELISM = 'false'\n")
    assert open_backend(f"docker:{path}").profile.environment.set == {"TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--on", "slurm:nowhere", "--nproc", "2"],
            "profile nowhere: no such profile; shipped: gpu, ",
        ),
        (["--on", "slurm:absent.toml"], "profile absent.toml: cannot be read"),
        (["--on", "slurm:loopback"], "--nproc is missing"),
        (["--on", "slurm:gpu", "--nproc", "4"], "--nproc 4: the profile has 8 ranks a node"),
        (["--on", "slurm:gpu"], "environment.pass of the profile names WANDB_API_KEY, which is not set"),
        (["--on", "local:gpu"], "--on local:gpu: say local, docker, docker:PROFILE, slurm or slurm:PROFILE"),
        (["--on", "mars"], "--on mars: say local"),
        (["--chain", "3"], "--chain goes with --on slurm"),
        (["--nodes", "2"], "--nodes goes with --on slurm"),
        (["--follow"], "--follow goes with --on slurm"),
        (["--set", "optimizer.peak_l=1"], "unknown key optimizer.peak_l, did you mean peak_lr?"),
    ],
)
def test_a_mistake_writes_nothing(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    make_data(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    before = sorted(tmp_path.rglob("*"))
    assert main(["launch", str(recipe), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("remit: ")
    assert says in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path)
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    assert main(["launch", str(recipe), "--on", "slurm:loopback", "--nproc", "2"]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]
