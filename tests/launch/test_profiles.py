"""Cluster profiles: the shipped ones load, and a wrong one is one line, exit code 2, and nothing written."""

from pathlib import Path

import pytest

from launch.backends import open_backend
from launch.profiles import shipped
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
