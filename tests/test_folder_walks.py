"""Every place that lists a folder either takes all that is there, or names what it left, or looks for its own files.

A new place has to say here which of them it is. The first two kinds have a test with one of each thing that may lie in
such a folder, which the table names.
"""

import ast
import collections
import importlib.util

import pytest

from tests.test_structure import ROOT, tracked

LISTS = {"glob", "rglob", "iterdir", "scandir", "listdir", "walk"}
OWN = "own files, under names that this project gives"
WALKS: dict[str, tuple[int, str]] = {
    "data_prep/assemble.py": (2, OWN),
    "data_prep/folders.py": (2, "tests/data_prep/test_folders.py: test_every_entry_is_read_or_has_a_reason"),
    "data_prep/inputs.py": (2, "tests/data_prep/test_folders.py: test_what_may_be_text_needs_the_users_word"),
    "data_prep/inspect.py": (1, OWN),
    "data_prep/tokenize.py": (1, OWN),
    "data_prep/work.py": (3, OWN),
    "launch/backends/slurm/log.py": (1, OWN),
    "launch/preflight/room.py": (1, "all files of a checkpoint, for their size"),
    "launch/profiles.py": (1, OWN),
    "remit_megatron/analysis/trajectories.py": (1, OWN),
    "remit_megatron/benchmark/cli.py": (4, "tests/benchmark/test_before.py: test_mistakes"),
    "remit_megatron/benchmark/harness.py": (2, OWN),
    "remit_megatron/benchmark/readings.py": (1, "the harness's files of one task, under the name it gives them"),
    "remit_megatron/benchmark/run.py": (1, "tests/benchmark/test_before.py: test_local_tasks_are_known_by_all_files"),
    "remit_megatron/convert/exporter.py": (1, "tests/hf/test_convert.py: test_an_export_says_what_it_left"),
    "remit_megatron/convert/megatron_lm.py": (2, "all files of a checkpoint"),
    "remit_megatron/data/files.py": (2, OWN),
    "remit_megatron/data/index_cache.py": (1, OWN),
    "remit_megatron/data/packed.py": (1, OWN),
    "remit_megatron/flywheel/content.py": (1, "all files of a model's folder but prose and hidden ones"),
    "remit_megatron/flywheel/state.py": (1, "whether a folder is empty"),
    "remit_megatron/flywheel/table.py": (2, OWN),
    "remit_megatron/hf/folder.py": (1, "only for a message; the index names the shards"),
    "remit_megatron/mcore/dist_checkpoint.py": (2, OWN),
    "remit_megatron/mcore/megatron_lm/checkpoint.py": (2, "whether it is of the old format, which is refused"),
    "remit_megatron/posttrain/contract.py": (3, "all files of a model's folder but its card"),
    "remit_megatron/posttrain/output.py": (1, "what an engine left; what a model does not need goes"),
    "remit_megatron/posttrain/stage.py": (2, OWN),
    "remit_megatron/posttrain/trl_engine.py": (4, OWN),
    "remit_megatron/run/checkpoint.py": (7, OWN),
    "remit_megatron/run/folder.py": (1, "whether others' files are in a run's folder"),
    "remit_megatron/scores/queue.py": (2, OWN),
    "remit_megatron/train/tokens.py": (1, OWN),
}


def walks() -> dict[str, int]:
    """Calls that list a folder, by file."""
    found: collections.Counter[str] = collections.Counter()
    for path in tracked("remit_megatron/*.py", "data_prep/*.py", "launch/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LISTS:
                found[str(path.relative_to(ROOT))] += not (
                    isinstance(node.func.value, ast.Name) and node.func.value.id == "ast"
                )
    return {name: count for name, count in found.items() if count}


def test_every_place_that_lists_a_folder_is_known() -> None:
    assert walks() == {name: count for name, (count, _) in WALKS.items()}


@pytest.mark.parametrize("why", sorted({why for _, why in WALKS.values() if why.startswith("tests/")}))
def test_the_tests_that_are_named_are_there(why: str) -> None:
    file, test = why.split(": ")
    spec = importlib.util.find_spec(file.removesuffix(".py").replace("/", "."))
    assert spec is not None
    assert f"def {test}(" in (ROOT / file).read_text()
