"""Rules of the code's shape: small files and functions, no import cycle between files, lines that fit."""

import ast
import graphlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("remit_megatron", "data_prep", "launch", "slurm", "examples")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 120


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and lines of every function, its decorators and docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def test_files_and_functions_are_small() -> None:
    files = tracked(*(f"{package}/*.py" for package in PACKAGES))
    assert len(files) > 100, "the packages are looked at"
    too_long = []
    for path in files:
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{name}: {lines} lines")
        too_long += [
            f"{name}: {function} has {lines} lines"
            for function, lines in functions(ast.parse(text))
            if lines > MAX_FUNCTION_LINES
        ]
    assert not too_long, "\n".join(["split these:", *too_long])


@pytest.mark.parametrize("package", ["remit_megatron", "data_prep", "launch"])
def test_no_file_imports_itself_through_others(package: str) -> None:
    """Imports inside functions count too, so that none of them hides a cycle."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 10, "the graph has imports"
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a cycle of imports: {' <- '.join(error.args[1])}")


def test_lines_fit() -> None:
    """Of documents, scripts and settings; ruff sees to Python's. A row of a table cannot be broken."""
    too_wide = []
    for path in tracked("*.md", "*.toml", "*.sh", "*.sbatch", "*.yml", "*.yaml", "Makefile", "Dockerfile"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > MAX_COLUMNS and not line.startswith("|"):
                too_wide.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert not too_wide, "\n".join(["wrap these:", *too_wide])
