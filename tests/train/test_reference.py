"""The co-located reference: neutral when it is the student, frozen, and noticed when it is not."""

from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import parse_recipe
from remit_megatron.errors import RunError
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, settings, train_all

ONE_STEP = {"schedule": {"train_tokens": SEQUENCE * SAMPLES, "warmup_tokens": 0}}


def test_neutral_when_it_is_the_student(folder: Path) -> None:
    """Weights of exactly 1, and NTP's loss and gradient norm bit for bit, in each layout."""
    model = {"init": str(folder / "base")}
    layouts = {"tp": {"tensor": 2, "sequence": True}, "pp": {"pipeline": 2}, "cp": {"context": 2}, "dp": {}}
    recipes = []
    for name, layout in layouts.items():
        for make, kind in ((settings, "ntp"), (remit, "remit")):
            recipe = make(folder, f"neutral {name} {kind}", parallel=layout, **ONE_STEP)
            recipe["model"] = model
            recipes.append(recipe)
    assert run_ranks(2, train_all, recipes) == [[(0, "")] * len(recipes)] * 2
    for name in layouts:
        ((ntp,), (guided,)) = (metrics(folder, f"neutral {name} {kind}") for kind in ("ntp", "remit"))
        assert (guided["weight_mean"], guided["weight_std"], guided["gap_mean"]) == (1.0, 0.0, 0.0), name
        for key in ("loss", "nll", "grad_norm", "eval/held/nll"):
            assert guided[key] == ntp[key], (name, key)


def change_reference(rank: int, recipe: Any) -> str:
    """One bit of one weight, on the last rank only, between two checkpoints."""
    import torch.distributed as dist

    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.loss_hook import unwrap
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process
    from remit_megatron.train.loop import start

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    trainer = start(parse_recipe(recipe), process)
    trainer.saver.save(wait=True)
    if rank == size - 1:
        weight = next(unwrap(trainer.saver.reference.chunks[-1]).parameters())
        weight.data.view(-1)[3].mul_(1 + 2**-23)
    try:
        trainer.saver.save(wait=True)
        return "not noticed"
    except RunError as error:
        return str(error)
    finally:
        trainer.close()
        destroy_groups()


def test_a_changed_weight_is_noticed_on_every_rank(folder: Path) -> None:
    recipe = remit(folder, "changed", parallel={"tensor": 2})
    for message in run_ranks(2, change_reference, recipe):
        assert "the reference's weights have changed during the run" in message
