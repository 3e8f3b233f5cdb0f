"""pretrain_remit.py in Megatron-LM's training loop trains, step by step, as `remit train` does from the same weights.

Two programs with loaders, schedules' drivers, logs and a forward step of their own; Megatron-Core and this package's
loss are common. Megatron-LM prints seven digits of a loss, of which the second line gives the mean of two, and three
decimals of a gradient norm: the tolerances are half a unit of these, and float32 round-off of other layouts.
"""

from pathlib import Path
from typing import Any

import pytest

from remit_megatron.convert import megatron_lm
from tests.megatron_lm.scripts import PRETRAIN_GPT, SCRIPT, STEPS, TRAIN_TOKENS, needs_megatron_lm, run, steps
from tests.ranks import run_ranks
from tests.train import runs

pytestmark = needs_megatron_lm
LOSS_RTOL, GRAD_NORM_ATOL = 5e-6, 1e-3
UNTIED = {"tied_embeddings": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 x 2 virtual": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "CP2": (2, {"context_parallel_size": 2, "spec": ["tests.megatron_lm.spec", "layer"]}),
    "DP2 distributed": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
}


def from_base(folder: Path, **changes: Any) -> dict[str, Any]:
    """The schedule of 12 steps, cut off after STEPS."""
    start = {"model": {"init": str(folder / "base"), **UNTIED}, "evaluation": {"every_steps": 100}}
    return {**start, "checkpoint": {"every_steps": STEPS, "keep": 3}, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a wider and deeper reference, NTP and ReMiT from base by `remit train`; and base for Megatron-LM."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    runs.make_data(folder)
    wide = {"num_layers": 8, "hidden_size": 48, "ffn_hidden_size": 64, **UNTIED}
    short = {"schedule": {"train_tokens": TRAIN_TOKENS // 2}}
    recipes = [
        runs.settings(folder, "base", model=UNTIED, **short),
        runs.settings(folder, "reference", model=wide),
        runs.settings(folder, "ntp", **from_base(folder)),
        runs.settings(
            folder,
            "remit",
            **from_base(folder, objective={"name": "remit"}, reference={"path": str(folder / "reference")}),
        ),
    ]
    for recipe in recipes:
        recipe["data"].pop("eval", None)
        recipe.setdefault("parallel", {})["distributed_optimizer"] = False
    (outcomes,) = run_ranks(1, runs.train_all, recipes)
    assert [code for code, _ in outcomes] == [0] * 4, outcomes
    megatron_lm.export(str(folder / "base"), folder / "weights")
    return folder


def start(folder: Path, script: str, nproc: int, **changes: Any) -> list[dict[str, float]]:
    return steps(
        run(
            script,
            nproc,
            folder,
            load=folder / "weights",
            finetune=True,
            untie_embeddings_and_output_weights=True,
            **changes,
        )
    )


def compare(found: list[dict[str, float]], folder: Path, name: str, first: int = 1) -> None:
    wanted = runs.metrics(folder, name)[first - 1 :]
    assert [one["iteration"] for one in found] == list(range(first, STEPS + first))
    for step, line in zip(found, wanted, strict=False):
        assert step["lm loss"] == pytest.approx(line["nll"], rel=LOSS_RTOL)
        assert step["grad norm"] == pytest.approx(line["grad_norm"], abs=GRAD_NORM_ATOL)
        for key in ("loss", "ref_nll", "clipped_low", "clipped_high"):
            if f"remit {key}" in step:
                assert step[f"remit {key}"] == pytest.approx(line[key], rel=LOSS_RTOL), key
    assert (name == "remit") == ("remit ref_nll" in found[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_remit_equals_remit_train(folder: Path, layout: str) -> None:
    nproc, changes = LAYOUTS[layout]
    reference = max((folder / "reference/checkpoints").glob("step-*"))
    compare(start(folder, SCRIPT, nproc, remit_reference=reference, **changes), folder, "remit")


def test_ntp_equals_pretrain_gpt_and_remit_train(folder: Path) -> None:
    compare(start(folder, PRETRAIN_GPT, 1), folder, "ntp")
    compare(start(folder, SCRIPT, 1, remit_objective="ntp"), folder, "ntp")


def test_evaluation_is_plain_ntp(folder: Path) -> None:
    """Before the first update both scripts say the same of the same validation set."""
    reference = max((folder / "reference/checkpoints").glob("step-*"))
    evaluated = []
    common = {"split": "80,20,0", "eval_iters": 2, "eval_interval": 100, "skip_train": True}
    for script, more in ((PRETRAIN_GPT, {}), (SCRIPT, {"remit_reference": reference})):
        done = run(
            script, 1, folder, load=folder / "weights", finetune=True, untie_embeddings_and_output_weights=True,
            **common, **more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        (line,) = [line for line in done.stdout.splitlines() if "lm loss value" in line][:1]
        evaluated.append(line.split("lm loss value:")[1].split("|")[0])
    assert evaluated[0] == evaluated[1]


def test_plain_load_goes_on_from_a_checkpoint_of_a_run(folder: Path) -> None:
    """Weights, moments, schedule and samples: steps after the export are those of the run itself."""
    megatron_lm.export(str(folder / "ntp/checkpoints" / f"step-{STEPS:08d}"), folder / "goes-on")
    found = steps(run(PRETRAIN_GPT, 1, folder, load=folder / "goes-on", untie_embeddings_and_output_weights=True))
    compare(found, folder, "ntp", first=STEPS + 1)


def test_a_mistake_is_one_line(folder: Path) -> None:
    done = run(SCRIPT, 1, folder, remit_reference="nowhere", untie_embeddings_and_output_weights=True)
    assert done.returncode != 0
    assert "pretrain_remit: --remit-reference nowhere: is no folder" in done.stderr
