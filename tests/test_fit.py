"""`remit plan` and `remit check` accept the same layouts: those in which everything deals out evenly."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.check import check_recipe
from remit_megatron.config import Parallel, Recipe, parse_recipe
from remit_megatron.errors import UserError
from remit_megatron.plan import plan
from remit_megatron.run.checkpoint import Meta, read_meta, write_meta
from remit_megatron.shape import resolve_shape
from tests.train.runs import SEQUENCE, make_data, remit

SAMPLES = 24
NUM_LAYOUTS = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and a reference of other depth than the student that says of itself what a trained one says."""
    folder = tmp_path_factory.mktemp("fit")
    make_data(folder)
    student = parse_recipe(remit(folder, "run")).model
    shape = resolve_shape(student).model_copy(update={"num_layers": 8})
    (folder / "base").mkdir()
    write_meta(folder / "base", Meta(shape=shape.model_dump(), step=1))
    return folder


def layouts() -> Iterator[dict[str, Any]]:
    """A fixed choice of all combinations, which are too many."""
    choices = {
        "tensor": (1, 2, 4),
        "pipeline": (1, 2, 3),
        "virtual_pipeline": (1, 2),
        "context": (1, 2),
        "microbatch_samples": (1, 2, 3, 5),
        "merge_microbatches": (1, 2, 3, 4),
        "ranks": (2, 4, 6, 8, 12),
    }
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return iter(random.Random(0).sample(every, NUM_LAYOUTS))


def even_parts(items: int, parts: int) -> bool:
    """Whether dealing items one by one in turns leaves every part with as many."""
    held = Counter(item % parts for item in range(items))
    return len(held) == parts and len(set(held.values())) == 1


def expected_microbatches(layout: dict[str, Any]) -> int | None:
    """How many a rank has, by dealing everything out; None where something is left over."""
    tp, pp, vpp, cp = (layout[key] for key in ("tensor", "pipeline", "virtual_pipeline", "context"))
    if not all(even_parts(items, tp) for items in (4, 2, 48)):  # heads, KV groups, width of the feed-forward layer
        return None
    if not all(even_parts(layers, pp * vpp) for layers in (4, 8)):
        return None
    if not even_parts(layout["ranks"], tp * pp * cp):
        return None
    taken = [0] * (layout["ranks"] // (tp * pp * cp))
    left, turn = SAMPLES, 0
    while left >= layout["microbatch_samples"]:
        left -= layout["microbatch_samples"]
        taken[turn % len(taken)] += 1
        turn += 1
    if left or len(set(taken)) != 1:
        return None
    count = taken[0]
    merged = layout["merge_microbatches"]
    passes = [min(merged, count - first) for first in range(0, count, merged)]
    if set(passes) != {merged}:
        return None
    if vpp > 1 and not (even_parts(count, pp) and even_parts(len(passes), pp)):
        return None
    return count


def recipe_of(folder: Path, layout: dict[str, Any]) -> Recipe:
    names = Parallel.model_fields
    return parse_recipe(
        remit(
            folder,
            "run",
            parallel={key: value for key, value in layout.items() if key in names},
            batch={
                "global_batch_tokens": SEQUENCE * SAMPLES,
                "microbatch_samples": layout["microbatch_samples"],
            },
            reference={"path": str(folder / "base"), "merge_microbatches": layout["merge_microbatches"]},
        )
    )


def outcome(function: Any, *arguments: Any) -> str:
    try:
        return function(*arguments)
    except UserError as error:
        return f"refused: {error}"


def test_plan_and_check_agree(folder: Path) -> None:
    """On every layout both say the same, word for word where they refuse, and what dealing out says."""
    accepted, reasons = 0, Counter[str]()
    for layout in layouts():
        recipe = outcome(recipe_of, folder, layout)
        if isinstance(recipe, str):  # what the recipe alone shows, neither comes to see
            continue
        planned, checked = outcome(plan, recipe, layout["ranks"]), outcome(check_recipe, recipe, layout["ranks"])
        count = expected_microbatches(layout)
        if count is None:
            assert planned.startswith("refused: "), layout
            assert planned == checked, layout
            reasons[planned.split(" = ")[0]] += 1
        else:
            assert f"; {count} microbatches of" in planned, (layout, planned)
            assert f", {count} microbatches a step" in checked, (layout, checked)
            accepted += 1
    assert accepted > 40, "layouts that fit are among those tried"
    assert len(reasons) >= 6, f"so are many kinds that do not: {reasons}"


def test_plan_sees_merged_microbatches(folder: Path) -> None:
    layout = {"ranks": 2, "microbatch_samples": 1, "merge_microbatches": 5}
    with pytest.raises(UserError, match="merge_microbatches = 5 does not fit 12 microbatches a step"):
        plan(recipe_of(folder, layout), 2)


def test_plan_sees_the_vocabulary(folder: Path) -> None:
    """A reference that is on this machine is looked at, not only its layout."""
    settings = remit(folder, "run", model={"vocab_size": 62}, parallel={})
    for look in (lambda r: plan(r, 1), lambda r: check_recipe(r, 1)):
        with pytest.raises(UserError, match="its vocabulary has 61 rows, the model's 62"):
            look(parse_recipe(settings))


def test_plan_and_check_see_the_layout_of_a_scorer(folder: Path) -> None:
    settings = remit(folder, "run", parallel={})
    settings["reference"]["queue"] = {"parallel": {"tensor": 4}}
    for look in (lambda r: plan(r, 1), lambda r: check_recipe(r, 1)):
        with pytest.raises(UserError, match=r"reference.queue: reference\.num_query_groups = 2 does not"):
            look(parse_recipe(settings))


def test_plan_and_check_see_other_tokenizers(folder: Path) -> None:
    """Of the same size, and both known: what check refuses, plan refuses as well."""
    for name, tokenizer in (("ours", "a" * 64), ("theirs", "b" * 64)):
        meta = read_meta(folder / "base")
        (folder / name).mkdir()
        write_meta(folder / name, replace(meta, shape=meta.shape | {"num_layers": 4}, tokenizer=tokenizer))
    settings = remit(folder, "run", parallel={}, reference={"path": str(folder / "theirs")})
    settings["model"] = {"init": str(folder / "ours")}
    for look in (lambda r: plan(r, 1), lambda r: check_recipe(r, 1)):
        with pytest.raises(UserError, match=r"reference.path: its tokenizer is not that of model.init"):
            look(parse_recipe(settings))
