"""What installing this package does to an environment: it adds, and changes nothing of the host's.

The host is recorded: what pip resolved for torch 2.13.0 with CUDA, Megatron-Core 0.19.2 and Transformer Engine on
Python 3.12, name, version and needs of each distribution. pip itself resolves against it, without an index.
"""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOST = json.loads((Path(__file__).parent / "versions" / "gpu_host.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BLOCKED = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # as if it were not installed
"""
PLUGIN = """
from remit_megatron.mcore import RemitGPTModel, make_forward_step, platform
from remit_megatron.objectives import Remit
from remit_megatron import remit_weights, token_nll
"""


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git has, as `pip install .` builds it; nothing of the build is left in this folder."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip("no git repository: the sources of a wheel are what git has")
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder / "source")], input=archive.stdout, check=True)
    (folder / "source/pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    built = pip("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source"))
    assert built.returncode == 0, built.stdout + built.stderr
    said = [line for line in (built.stdout + built.stderr).splitlines() if re.search("warning|deprecat", line, re.I)]
    assert [line for line in said if "byte-compiling is disabled" not in line] == []
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_what_is_no_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = ["remit_megatron/py.typed", "slurm/train.sbatch", "slurm/profiles/gpu.toml"]
    data += [str(path.relative_to(ROOT)) for path in (ROOT / "launch/recipes").rglob("*") if path.is_file()]
    assert len(data) > 15
    assert not set(data) - names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]


def host(folder: Path, distributions: list[dict[str, object]]) -> Path:
    """An environment in which these distributions are installed, as far as pip sees."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for one in distributions:
        info = site / f"{str(one['name']).replace('-', '_')}-{one['version']}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {need}\n" for need in one["requires_dist"])  # type: ignore[attr-defined]
        head = f"Metadata-Version: 2.1\nName: {one['name']}\nVersion: {one['version']}\n"
        (info / "METADATA").write_text(head + needs)
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder


def stand_in(folder: Path, name: str) -> None:
    """A wheel of a distribution that may be added: any version, needing nothing."""
    stem = f"{name.replace('-', '_')}-99.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def added(wheel: Path, extra: str, environment: Path, folder: Path) -> set[str]:
    """Names of what pip would install for the package with an extra."""
    folder.mkdir()
    for requirement in [*EXTRAS["train"], "psutil"]:
        stand_in(folder, name_of(requirement))
    python = next(iter((environment / "bin").glob("python")))
    report = folder / "report.json"
    done = pip(
        f"--python={python}", "install", "--dry-run", "--no-index", f"--find-links={folder}", f"--report={report}",
        "--ignore-requires-python", f"{wheel}{extra}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name_of(one["metadata"]["name"]) for one in json.loads(report.read_text())["install"]}


def test_a_gpu_host_keeps_what_it_has(wheel: Path, tmp_path: Path) -> None:
    """Also where torch is a pre-release of its builder, as in NVIDIA's images."""
    names = {name_of(one["name"]) for one in HOST["distributions"]}
    assert {"torch", "megatron-core", "transformer-engine-torch", "triton", "nvidia-cublas", "numpy"} <= names
    vendors = [
        {**one, "version": "2.12.0a0+0123abc.nv26.6"} if one["name"] == "torch" else one
        for one in HOST["distributions"]
    ]
    for i, distributions in enumerate((HOST["distributions"], vendors)):
        environment = host(tmp_path / f"host{i}", distributions)
        plugin = added(wheel, "", environment, tmp_path / f"plugin{i}")
        assert plugin == {"remit-megatron", "psutil"}
        trainer = added(wheel, "[train]", environment, tmp_path / f"trainer{i}")
        assert trainer == {"remit-megatron", "psutil", *map(name_of, EXTRAS["train"])} - names


def test_a_pin_would_be_seen(wheel: Path, tmp_path: Path) -> None:
    """The same question to a host with a Megatron-Core that is too new: pip has to refuse."""
    newer = [{**one, "version": "0.20.0"} if one["name"] == "megatron-core" else one for one in HOST["distributions"]]
    with pytest.raises(AssertionError, match="megatron-core"):
        added(wheel, "", host(tmp_path / "host", newer), tmp_path / "links")


def test_setup_installs_what_the_ranges_allow() -> None:
    """constraints.txt has every direct dependency of `make setup`, at a version that pyproject.toml allows."""
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name_of(line): line.partition("==")[2] for line in lines}
    assert len(pins) == len(lines) > 100
    wanted, left = list(PROJECT["dependencies"]), ["dev"]
    while left:
        for requirement in EXTRAS[left.pop()]:
            own = name_of(requirement) == "remit-megatron"
            left += sorted(Requirement(requirement).extras) if own else []
            wanted += [] if own else [requirement]
    for requirement in map(Requirement, wanted):
        name = name_of(requirement.name)
        if name != "triton":
            assert pins[name] in requirement.specifier, f"{requirement}: constraints.txt has {pins[name]}"
    assert "triton" not in pins, "a CUDA build of torch brings its own"


def run_without(packages: list[str], program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", BLOCKED.format(blocked=packages) + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_plugin_needs_no_extra() -> None:
    modules = {name_of(requirement).replace("-", "_") for requirement in EXTRAS["train"]}
    blocked = sorted(modules | {"triton", "wandb", "datasets", "transformers", "trl"})
    assert run_without(blocked, PLUGIN).stderr == ""
    command = "from remit_megatron.cli import main\nsys.exit(main({arguments}))"
    assert "usage: remit" in run_without(blocked, command.format(arguments=["--help"])).stdout
    analyze = ["analyze", "runs", "a", "b", "--metric", "nll", "--output", "out"]
    for arguments, package in ((analyze, "matplotlib"), (["status", "."], "orjson")):
        done = run_without(blocked, command.format(arguments=arguments))
        assert done.returncode == 2
        remedy = "pip install 'remit-megatron[train]'"
        assert done.stderr == f"remit: {package}, which this command needs, is not installed: {remedy}\n"
