"""A run of the trainer on converted models against the paper's equations written out over transformers.

Ten steps with AdamW in float32 on two tensor-parallel ranks. The plain loop below shares nothing with the package but
the samples: its models are transformers', its loss Equations 3 to 6, its optimizer torch's. Losses differ by less than
1e-6 over the ten steps here; 1e-4 is what the comparison promises.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remit_megatron.check import check_recipe
from remit_megatron.config import parse_recipe
from remit_megatron.data.deal import Deal
from remit_megatron.errors import UserError
from remit_megatron.run.build_plan import make_build_plan
from tests.hf import tiny
from tests.ranks import run_ranks
from tests.train import runs

STEPS, PEAK, WARMUP_STEPS, EPSILON = 10, 3e-3, 2, 0.2
TOKENS = runs.SEQUENCE * runs.SAMPLES
PAIRS = {
    # The reference is deeper than the student, or has another RoPE base: each model keeps its own.
    "olmo2": {"num_hidden_layers": 6},
    "smollm3": {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}},
    "youtu": {"intermediate_size": 34},
}
DIRECT = "olmo2"
"""Named in the recipe by its Hugging Face folders; the others by checkpoints that were imported before."""


def recipe(root: Path, name: str) -> dict[str, Any]:
    kind = "hf" if name == DIRECT else "checkpoint"
    made = runs.settings(root, f"run-{name}", parallel={"tensor": 2}, checkpoint={"every_steps": 0})
    made["model"] = {"init": str(root / kind / f"{name} student")}
    made["reference"] = {"path": str(root / kind / f"{name} reference")}
    made["objective"] = {"name": "remit", "epsilon": EPSILON}
    made["optimizer"] = {"peak_lr": PEAK, "min_lr": PEAK / 10}
    made["schedule"] = {"train_tokens": STEPS * TOKENS, "warmup_tokens": WARMUP_STEPS * TOKENS}
    return made


def import_pairs(rank: int, folder: str, names: list[str]) -> None:
    from remit_megatron.convert.importer import import_folder

    root = Path(folder)
    (root / "checkpoint").mkdir()
    for name in names:
        import_folder(root / "hf" / name, root / "checkpoint" / name, quiet=True)


def import_rounded(rank: int, source: str, target: str) -> None:
    from remit_megatron.convert.importer import import_folder

    import_folder(Path(source), Path(target), torch.bfloat16, quiet=True)


def train(rank: int, folder: str) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Train every recipe; returns the samples of every step by family."""
    import torch.distributed as dist

    from remit_megatron.mcore import datasets
    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process, StopSignals
    from remit_megatron.train.loop import start

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    samples = {}
    for name in PAIRS:
        trainer = start(parse_recipe(recipe(Path(folder), name)), process)
        samples[name] = [_join(datasets, trainer, step) for step in range(STEPS)]
        trainer.run(StopSignals())
        trainer.close()
        destroy_groups()
    return samples


def _join(datasets: Any, trainer: Any, step: int) -> dict[str, torch.Tensor]:
    parts = trainer.parts
    batches = datasets.microbatches(
        parts.ready.data, step * runs.SAMPLES, parts.num_microbatches, Deal(microbatch_samples=2)
    )
    return {key: torch.cat([getattr(b, key) for b in batches]) for key in ("tokens", "labels", "loss_mask")}


def plain_loop(student: Any, reference: Any, samples: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """ReMiT over transformers' models, one global batch at a time."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    lines = []
    for step, batch in enumerate(samples):
        mask = batch["loss_mask"].float()
        nll = _nll(student, batch)
        with torch.no_grad():
            ref = _nll(reference, batch)
            gap = nll - ref  # Equation 3
            mean = (gap * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # Equation 4
            weight = (2 * torch.sigmoid(gap - mean)).clamp(1 - EPSILON, 1 + EPSILON)  # Equation 5
        loss = (mask * weight * nll).sum() / mask.sum()  # Equation 6
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        lr = _learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        mean_nll = float((mask * nll).sum() / mask.sum())
        mean_ref = float((mask * ref).sum() / mask.sum())
        lines.append({"loss": loss.item(), "nll": mean_nll, "ref_nll": mean_ref, "grad_norm": norm.item(), "lr": lr})
    return lines


def _nll(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logp = model(batch["tokens"]).logits.log_softmax(-1)
    return -logp.gather(-1, batch["labels"][..., None])[..., 0]


def _learning_rate(step: int) -> float:
    """Linear from 0, then a cosine to a tenth of the peak; a rate belongs to the tokens before the step."""
    if step < WARMUP_STEPS:
        return PEAK * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK / 10 + 0.9 * PEAK * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: (tiny.make_model(name, 1), tiny.make_model(name, 2, **changes)) for name, changes in PAIRS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> Path:
    root = tmp_path_factory.mktemp("remit")
    runs.make_data(root)
    for name, pair in models.items():
        for role, model in zip(("student", "reference"), pair, strict=True):
            tiny.save(model, root / "hf" / f"{name} {role}")
    names = [f"{name} {role}" for name in PAIRS if name != DIRECT for role in ("student", "reference")]
    run_ranks(1, import_pairs, str(root), names)
    return root


@pytest.fixture(scope="module")
def samples(root: Path) -> dict[str, Any]:
    return run_ranks(2, train, str(root))[0]


@pytest.mark.parametrize("name", list(PAIRS))
def test_losses(name: str, root: Path, samples: dict[str, Any], models: dict[str, Any]) -> None:
    want = plain_loop(*models[name], samples[name])
    got = [json.loads(line) for line in (root / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]
    assert len(got) == len(want) == STEPS
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-4, abs=1e-9), f"step {step} {key}"
    assert want[-1]["nll"] < want[0]["nll"] - 0.05, "the models must have learnt something"
    assert abs(want[0]["loss"] - want[0]["nll"]) > 1e-3, "weights of 1 would compare nothing"


def test_converted_once(root: Path, samples: dict[str, Any]) -> None:
    """The folders named in a recipe became checkpoints beside the run, keyed by content, with their origin."""
    cached = sorted((root / ".converted").iterdir())
    assert len(cached) == 2
    sources = {json.loads((folder / "meta.json").read_text())["origin"]["source"] for folder in cached}
    assert sources == {str(root / "hf" / f"{DIRECT} {role}") for role in ("student", "reference")}


def test_a_reference_is_known_by_its_weights(root: Path, tmp_path: Path) -> None:
    """Scores made with a folder serve its copy elsewhere, and not the same folder rounded to another type."""
    settings = recipe(root, DIRECT) | {"run": str(tmp_path / "new")}
    folder = Path(settings["reference"]["path"])
    shutil.copytree(folder, tmp_path / "copy")
    run_ranks(1, import_rounded, str(folder), str(tmp_path / "rounded"))
    identities = []
    for path in (folder, tmp_path / "copy", tmp_path / "rounded"):
        settings["reference"]["path"] = str(path)
        identities.append(make_build_plan(parse_recipe(settings), "cpu").reference_identity)
    assert identities[0] == identities[1] != identities[2]


def test_an_incomplete_folder_is_seen_by_check(root: Path, tmp_path: Path) -> None:
    """Before a job starts, not when it converts."""
    settings = recipe(root, DIRECT)
    torn = tmp_path / "torn"
    shutil.copytree(settings["reference"]["path"], torn)
    tensors = {k: v for shard in torn.glob("*.safetensors") for k, v in load_file(shard).items() if ".k_proj" not in k}
    for path in torn.glob("*safetensors*"):
        path.unlink()
    save_file(tensors, torn / "model.safetensors")
    settings["reference"]["path"] = str(torn)
    with pytest.raises(UserError, match=r"torn: 6 tensors are missing \(model.layers.0.self_attn.k_proj.weight"):
        check_recipe(parse_recipe(settings | {"run": str(tmp_path / "new")}))
