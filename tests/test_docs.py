"""What the documentation shows runs, and gives what it says."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from examples.smoke.run import QUICK_OVERRIDES
from launch.environment import RULES
from launch.local import run_local
from remit_megatron.cli import build_parser
from remit_megatron.config import Recipe
from remit_megatron.objectives.needs import ObjectiveSettings
from remit_megatron.sections import Section

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Every command line of a page's shell blocks, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_plugin_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The script trains, and two tensor-parallel ranks print what one prints (float32 sums in another order)."""
    script = tmp_path / "train.py"
    (code,) = blocks("docs/plugin.md", "python")
    script.write_text(code)
    losses = []
    for nproc in (1, 2):
        assert run_local([sys.executable, "-W", "ignore", str(script)], nproc) == 0
        losses.append([float(x) for x in re.findall(r"step \d+ nll ([\d.]+)", capfd.readouterr().out)])
    assert len(losses[0]) == 10
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=2e-5, abs=1e-6)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone in which `make smoke` has run, with a few steps of everything."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    run = run_in(folder, [sys.executable, "-W", "ignore", "-m", "examples.smoke", "--quick", "--out", "runs/smoke"])
    assert run.returncode == 0, run.stderr
    assert "exact match" in run.stdout.lower(), run.stdout
    return folder


def run_in(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_smoke_run(smoke: Path) -> None:
    """The table has four models with every figure, and the plot is a picture."""
    results = json.loads((smoke / "runs/smoke/results.json").read_text())
    text = json.dumps(results)
    for name in ("base", "reference", "ntp", "remit"):
        assert name in text
        lines = (smoke / f"runs/smoke/{name}/metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["tokens"] >= 8192
    (plot,) = (smoke / "runs/smoke").glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000


def test_readme_commands(smoke: Path) -> None:
    """Each `remit` line of the README, on the smoke run; the training lines with its few steps."""
    lines = [words for words in commands("README.md") if words[0] == ".venv/bin/remit"]
    assert {words[1] for words in lines} == {"check", "train", "eval", "doctor"}
    few = [part for key, value in QUICK_OVERRIDES.items() for part in ("--set", f"{key}={value}")]
    for words in lines:
        more = few if words[1] in ("train", "eval", "check") else []
        run = run_in(smoke, [sys.executable, "-m", "remit_megatron.cli", *words[1:], *more])
        assert run.returncode == 0, f"{shlex.join(words)}: {run.stderr}"
        assert "Warning" not in run.stderr, "a user sees this program's words, not its libraries'"
        if words[1] == "eval":
            assert json.loads(run.stdout)["eval/code/nll"] > 0
        if words[1] == "doctor":
            assert "megatron-core  0.16" in run.stdout
        if words[1] == "train" and "run=runs/eps" not in words:
            assert "resumes from step-" in run.stderr, "started again, it goes on"


def test_reliability_commands(smoke: Path) -> None:
    """Each line of docs/reliability.md, on the smoke run; the training lines with its few steps."""
    lines = commands("docs/reliability.md")
    assert [words[1] for words in lines] == ["status", "train", "train", "sync-wandb"]
    few = [part for key, value in QUICK_OVERRIDES.items() for part in ("--set", f"{key}={value}")]
    for words in lines:
        more = few if words[1] == "train" else []
        run = run_in(smoke, [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *words[1:], *more])
        assert run.returncode == 0, f"{shlex.join(words)}: {run.stderr}"
        if words[1] == "status":
            assert "state       done (exit code 0)" in run.stdout
        if words[1] == "sync-wandb":
            assert "of project remit, from metrics.jsonl: " in run.stdout
    assert list((smoke / "runs/smoke/remit").glob("wandb/offline-run-*/*.wandb"))


def test_analyses_commands(smoke: Path) -> None:
    """Each line of docs/analyses.md, on the smoke run; and every file that the page names."""
    tokens, runs = commands("docs/analyses.md")
    run = run_in(smoke, [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *tokens[1:]])
    assert run.returncode == 0, run.stderr
    assert re.search(r"^\| remit \| \d", run.stdout, re.MULTILINE), run.stdout
    folder = smoke / "runs/smoke/tokens"
    named = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/analyses.md").read_text(), re.MULTILINE)
    assert sorted(path.name for path in folder.iterdir()) == sorted(named)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "ntp", "remit"]
    assert summary["models"]["base"]["kl"]["mean"] > 0
    text = (folder / "margins.html").read_text()
    assert text.count("<h2>") == 3 * 4
    run = run_in(smoke, [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *runs[1:]])
    assert run.returncode == 0, run.stderr
    assert "| remit | 8,192 |" in run.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_pages_name_are_there(page: str) -> None:
    """Each by its path in the repository or in the package; a name in capitals stands for one of your own."""
    named = set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.(?:py|md|toml))`", (ROOT / page).read_text()))
    named |= set(re.findall(r"`((?:[a-z_0-9]+/)+)`", (ROOT / page).read_text()))
    assert named
    of_a_run = {"recipe.toml", "checkpoints/", "queue/", "runs/"}
    places = (ROOT, ROOT / "remit_megatron")
    absent = [name for name in named - of_a_run if not any((place / name).exists() for place in places)]
    assert not absent, f"{page} names {absent}"


def test_tests_that_the_reliability_page_names_are_there() -> None:
    """Each promise has one at least."""
    page = (ROOT / "docs/reliability.md").read_text()
    rows = page.partition("| promise | test |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", row)
        assert names, row
        for file, name in names:
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_architecture_has_every_layer() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text[text.index("## Layers") : text.index("Beside the package")]
    shown = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    folders = {path.parent.name for path in (ROOT / "remit_megatron").glob("*/__init__.py")}
    assert folders <= shown, f"docs/architecture.md has no layer for {sorted(folders - shown)}"


def test_recipe_page_has_every_section() -> None:
    """docs/reference/recipe.md shows each section of a recipe and each objective."""
    page = (ROOT / "docs/reference/recipe.md").read_text()
    shown = set(re.findall(r"^::: \S+\.(\w+)$", page, re.MULTILINE))
    sections, left = set(), [Recipe]
    while left:
        one = left.pop()
        sections.add(one.__name__)
        inner = [kind for field in one.model_fields.values() for kind in leaves(field.annotation)]
        left += [kind for kind in inner if issubclass(kind, Section) and kind.__name__ not in sections]
    settings = {
        kind.__name__
        for kind in ObjectiveSettings.__subclasses__()
        if kind.__module__.startswith("remit_megatron.objectives.settings")
    }
    assert shown == sections | settings


def leaves(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [leaf for part in get_args(annotation) for leaf in leaves(part)]


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="zensical is not installed: make setup")
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    """As `make docs` does it; and a link to nowhere, and a name that is gone, are refused."""
    for name in ("docs", "remit_megatron"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = run_in(tmp_path, build)
    assert done.returncode == 0, done.stdout + done.stderr
    index = json.loads((tmp_path / "site/search.json").read_text())
    assert "head_chunk_tokens" in json.dumps(index), "keys of a recipe can be searched for"
    for page in (tmp_path / "docs").rglob("*.md"):
        page.unlink()
    settings = (tmp_path / "mkdocs.yml").read_text()
    without_pages = re.sub(r"^nav:\n(?: .*\n)+", "", settings, flags=re.MULTILINE)
    assert without_pages != settings
    (tmp_path / "mkdocs.yml").write_text(without_pages)
    for text, fine in {
        "": True,
        "[gone](gone.md)": False,
        "[gone](#gone)": False,
        "::: remit_megatron.gone": False,
    }.items():
        (tmp_path / "docs/index.md").write_text(f"# Title\n\n{text}\n")
        assert (run_in(tmp_path, build).returncode == 0) == fine, text


def test_table_of_variables() -> None:
    """docs/clusters.md has the rules of launch/environment.py, all of them and as they are."""
    rows = [line for line in (ROOT / "docs/clusters.md").read_text().splitlines() if re.match(r"\| `[A-Z_]+` \|", line)]
    assert rows == [f"| `{rule.name}` | `{rule.value}` | {rule.when} | {rule.why} |" for rule in RULES]


def test_commands_of_the_clusters_page() -> None:
    """tests/slurm runs them; here, that each is one that the program has."""
    lines = [words for words in commands("docs/clusters.md") if words[0] == ".venv/bin/remit"]
    assert [words[1] for words in lines] == ["check", "launch", "launch", "status", "launch"]
    for words in lines:
        build_parser().parse_args(words[1:])


def test_commands_of_the_objectives_page() -> None:
    """Each is one that the program has, and both of kept distributions belong together."""
    lines = [words for words in commands("docs/objectives.md") if words[0] == ".venv/bin/remit"]
    parsed = [build_parser().parse_args(words[1:]) for words in lines]
    (made,) = (one for one in parsed if getattr(one, "distribution", None))
    wanted = [f"reference.scores={made.output}", f"reference.distribution={made.distribution}"]
    assert wanted in [getattr(one, "overrides", None) for one in parsed]


def test_makefile_has_the_targets_of_the_readme() -> None:
    targets = {words[1] for words in commands("README.md") if words[0] == "make"}
    assert targets == {
        *("smoke", "smoke-wheel", "docker-smoke", "flywheel", "docs"),
        *("test", "test-slow", "test-slurm", "test-image", "test-newest", "test-python"),
    }
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target
