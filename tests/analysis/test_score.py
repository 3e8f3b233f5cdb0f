"""Models on the same tokens: every layout against the definition in float64 from whole logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remit_megatron.analysis.score import _check_numbers
from remit_megatron.config import parse_recipe
from remit_megatron.errors import RemitError
from tests.ranks import run_ranks
from tests.train import runs

MODELS = ("plain", "guided")
SET_SAMPLES = 7
LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {},
]


def compare_all(rank: int, jobs: list[tuple[Any, str, dict[str, str]]]) -> list[Any]:
    """Comparisons of jobs (recipe, reference, models), or the message of the mistake."""
    import torch.distributed as dist

    from remit_megatron.analysis.score import compare_models
    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    found: list[Any] = []
    for recipe, reference, models in jobs:
        try:
            found.append(compare_models(parse_recipe(recipe), reference, models, "held", SET_SAMPLES, process))
        except RemitError as error:
            found.append(str(error))
        finally:
            dist.barrier()
            destroy_groups()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two runs from it: one plain, one guided by a reference that is the base of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    runs.make_data(folder)
    longer = {"schedule": {"train_tokens": 40 * 128, "warmup_tokens": 256}}
    recipes = [
        runs.settings(folder, "base", seed=7, **longer),
        runs.settings(folder, "plain"),
        runs.remit(folder, "guided", data={"eod_mask_loss": True, "eod_id": runs.EOD}),
    ]
    (outcomes,) = run_ranks(1, runs.train_all, recipes)
    assert outcomes == [(0, "")] * 3
    return folder


def job(folder: Path, parallel: dict[str, Any]) -> tuple[Any, str, dict[str, str]]:
    recipe = runs.remit(
        folder,
        "unused",
        parallel=parallel,
        data={"eod_mask_loss": True, "eod_id": runs.EOD},
        objective={"name": "remit", "epsilon": 0.3, "centering": "document"},
    )
    return recipe, str(folder / "base"), {name: str(folder / name) for name in MODELS}


@pytest.fixture(scope="module")
def comparisons(folder: Path) -> list[Any]:
    """One rank's first, then two ranks' of every layout."""
    ((one,),) = run_ranks(1, compare_all, [job(folder, {})])
    two = run_ranks(2, compare_all, [job(folder, layout) for layout in LAYOUTS])
    for mine, theirs in zip(*two, strict=True):
        assert np.array_equal(mine.models["plain"].kl, theirs.models["plain"].kl), "every rank holds the same"
    return [one, *two[0]]


def from_the_definition(rank: int, recipe: Any, folder: str, names: list[str]) -> tuple[torch.Tensor, Any]:
    """Texts [n, s + 1] of the set, and log p [n, s, V] float64 of each run, from logits of a model on one process."""
    from remit_megatron.mcore import datasets, dist_checkpoint
    from remit_megatron.mcore.whole import whole_model
    from remit_megatron.run.checkpoint import read_meta, resolve_checkpoint

    parsed = parse_recipe(recipe)
    source = datasets.open_source(parsed.data.eval["held"], parsed.data, runs.VOCAB)
    texts = torch.from_numpy(np.stack([source.text(i) for i in range(SET_SAMPLES)]))
    found = {}
    for name in names:
        path = resolve_checkpoint(str(Path(folder, name)), name)
        with whole_model(read_meta(path).model_shape(), torch.float32, runs.SEQUENCE) as model:
            dist_checkpoint.load_model(path, [model])
            positions = torch.arange(runs.SEQUENCE)[None]
            logits = torch.stack([model(row[None, :-1], positions, None)[0] for row in texts])
        found[name] = logits.double().log_softmax(-1)
    return texts, found


def test_against_the_definition(folder: Path, comparisons: list[Any]) -> None:
    """NLL and KL of single tokens: float32 logits of a few units err by 1e-6, and a token's NLL adds a few of those."""
    first = comparisons[0]
    assert first.tokens.shape == (SET_SAMPLES, runs.SEQUENCE)
    assert not first.mask.all()
    ((texts, log_p),) = run_ranks(1, from_the_definition, job(folder, {})[0], str(folder), ["base", *MODELS])
    assert np.array_equal(texts[:, 1:].numpy(), first.tokens)
    assert np.array_equal(texts[:, :-1].numpy() != runs.EOD, first.mask)
    labels, mask = texts[:, 1:, None], first.mask

    def masked(values: torch.Tensor) -> np.ndarray:
        return np.where(mask, values.numpy(), 0.0)

    def nll(name: str) -> np.ndarray:
        return masked(-log_p[name].gather(2, labels)[..., 0])

    assert np.allclose(first.reference_nll, nll("base"), atol=2e-5)
    for name in MODELS:
        model = first.models[name]
        kl = masked((log_p["base"].exp() * (log_p["base"] - log_p[name])).sum(-1))
        assert np.allclose(model.nll, nll(name), atol=2e-5)
        assert np.allclose(model.kl, kl, atol=2e-5)
        assert model.kl[mask].mean() > 0.05, "the models differ"
        assert np.allclose(first.margin(name), nll(name) - nll("base"), atol=4e-5)
        assert (model.weight[~mask] == 0).all()
        gap, documents = nll(name) - nll("base"), np.cumsum(texts[:, :-1].numpy() == runs.EOD, axis=1)
        for i, t in np.argwhere(mask):  # centred by document, as the recipe says
            same = mask[i] & (documents[i] == documents[i, t])
            weight = np.clip(2 / (1 + np.exp(gap[i, same].mean() - gap[i, t])), 0.7, 1.3)
            assert abs(model.weight[i, t] - weight) < 2e-5
        assert model.weight[mask].max() > 1.2, "the recipe's epsilon counts"


def test_layouts(comparisons: list[Any]) -> None:
    first, *others = comparisons
    for other in others:
        assert np.array_equal(other.tokens, first.tokens)
        assert np.array_equal(other.mask, first.mask)
        assert np.allclose(other.reference_nll, first.reference_nll, atol=2e-5)
        for name in MODELS:
            for what in ("nll", "kl", "weight"):
                assert np.allclose(getattr(other.models[name], what), getattr(first.models[name], what), atol=5e-5), (
                    f"{name} {what}"
                )


def test_a_model_against_itself_differs_nowhere(folder: Path) -> None:
    recipe, reference, _ = job(folder, {})
    ((found,),) = run_ranks(1, compare_all, [(recipe, reference, {"same": reference})])
    assert (np.abs(found.models["same"].kl) < 1e-6).all()
    assert (np.abs(found.margin("same")) < 1e-5).all()
    assert np.allclose(found.models["same"].weight[found.mask], 1.0, atol=1e-5)


def test_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    recipe, reference, models = job(folder, {})
    wide = runs.settings(folder, "wide", model={"vocab_size": 64}, schedule={"train_tokens": 128, "warmup_tokens": 0})
    jobs = [
        (recipe, str(tmp_path / "none"), models),
        (recipe, reference, {"wide": str(folder / "wide")}),
    ]
    ((trained, found),) = run_ranks(1, train_and_compare, [wide], jobs)
    assert trained == [(0, "")]
    assert found[0].startswith(f"--reference = '{tmp_path}/none' does not exist")
    assert "--models wide: the vocabulary of" in found[1]
    assert "has 64 rows, the reference's 61" in found[1]


def train_and_compare(rank: int, recipes: list[Any], jobs: list[Any]) -> tuple[Any, Any]:
    return runs.train_all(rank, recipes), compare_all(rank, jobs)


def test_numbers_that_are_none() -> None:
    """A masked token may hold anything, another may not."""
    mask = np.array([[True, True, False]])
    _check_numbers("--models m", np.array([[1.0, 2.0, np.nan]]), mask)
    with pytest.raises(RemitError, match=r"^--models m: 1 of 2 tokens have an NLL that is not a number: "):
        _check_numbers("--models m", np.array([[1.0, np.inf, 0.0]]), mask)
