"""Distilling runs of the trainer on a converted pair against loops over transformers' models.

As tests/hf/test_remit_run.py, whose samples, schedule and optimizer these are; here a global batch is several
microbatches, on two tensor-parallel ranks, and the plain loop routes the whole batch at once. In two of the runs one
model has more rows than the other.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remit_megatron.config import parse_recipe
from tests.hf import tiny
from tests.hf.test_remit_run import STEPS, _join, _learning_rate, recipe
from tests.ranks import run_ranks
from tests.train import runs

FAMILY = "olmo2"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": {"name": "kd", "kd_alpha": 0.5, "temperature": 2.0, "scale": "tau_squared"},
    "reverse": {"name": "kd", "kd_alpha": 0.5, "temperature": 2.0, "scale": "tau_squared", "direction": "reverse"},
    "switch": {"name": "switch"},
    "trkd": {"name": "trkd", "scope": "global", "share": 0.6, "kd_alpha": 0.5},
}
ROWS = {"forward": (61, 61), "reverse": (61, 66), "switch": (66, 61), "trkd": (61, 61)}
"""Of student and reference, which have one tokenizer: the losses compare the common rows."""


ROLES = {"student": 1, "reference": 2}
"""And the seeds of their weights."""


def settings(root: Path, name: str) -> dict[str, Any]:
    made = recipe(root, FAMILY)
    made["run"] = str(root / f"run-{name}")
    made["objective"] = OBJECTIVES[name]
    made["model"]["init"], made["reference"]["path"] = (
        str(root / "hf" / f"{role} {rows}") for role, rows in zip(ROLES, ROWS[name], strict=True)
    )
    return made


def train(rank: int, folder: str) -> list[dict[str, Tensor]]:
    """Train every recipe; returns the samples of every step."""
    import torch.distributed as dist

    from remit_megatron.mcore import datasets
    from remit_megatron.mcore.groups import destroy_groups
    from remit_megatron.mcore.platform import activate
    from remit_megatron.run.process import Process, StopSignals
    from remit_megatron.train.loop import start

    activate("cpu")
    size = dist.get_world_size()
    process = Process(rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"))
    samples: list[dict[str, Tensor]] = []
    for name in OBJECTIVES:
        trainer = start(parse_recipe(settings(Path(folder), name)), process)
        samples = [_join(datasets, trainer, step) for step in range(STEPS)]
        trainer.run(StopSignals())
        trainer.close()
        destroy_groups()
    return samples


def loss_of(name: str, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
    """The equations over one global batch's unmasked tokens: logits [n, V] of both models, labels [n]."""
    tau = OBJECTIVES[name].get("temperature", 2.0 if name == "switch" else 1.0)
    nll = -student.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    student, teacher = (logits[:, : min(ROWS[name])] for logits in (student, teacher))
    log_p, log_q = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    if name in ("forward", "reverse"):
        kl = forward if name == "forward" else reverse
        return {"loss": 0.5 * nll.mean() + 0.5 * tau**2 * kl.mean(), "kl": kl.mean().item(), "nll": nll.mean().item()}
    entropy = -(log_q.exp() * log_q).sum(-1)
    order = entropy.argsort(descending=name == "trkd")
    share = {"switch": 0.2, "trkd": 0.6}[name]
    on = torch.zeros_like(entropy, dtype=torch.bool)
    on[order[: math.ceil(share * len(entropy) - 1e-9)]] = True
    agrees = (teacher.argmax(-1) == labels).float()
    found: dict[str, float | Tensor] = {
        "routed": on.float().mean().item(),
        "entropy_threshold": entropy[order[int(on.sum()) - 1]].item(),
        "nll_routed": nll[on].mean().item(),
        "nll_rest": nll[~on].mean().item(),
        "agrees_routed": agrees[on].mean().item(),
        "agrees_rest": agrees[~on].mean().item(),
    }
    if name == "switch":
        loss = tau**2 * reverse[on].mean() + nll[~on].mean()
        return found | {"loss": loss, "kl_routed": reverse[on].mean().item()}
    loss = 0.5 * nll.mean() + 0.5 * forward[on].sum() / len(nll)
    return found | {"loss": loss, "kl_routed": forward[on].mean().item()}


def plain_loop(name: str, student: Any, teacher: Any, samples: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    lines = []
    for step, batch in enumerate(samples):
        kept = batch["loss_mask"] > 0
        with torch.no_grad():
            reference = teacher(batch["tokens"]).logits[kept]
        found = loss_of(name, student(batch["tokens"]).logits[kept], reference, batch["labels"][kept])
        loss = found["loss"]
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        optimizer.step()
        lines.append({key: float(value) for key, value in found.items()} | {"grad_norm": norm.item()})
    return lines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distil")
    runs.make_data(root)
    for role, rows in {(role, rows) for pair in ROWS.values() for role, rows in zip(ROLES, pair, strict=True)}:
        folder = tiny.save(tiny.make_model(FAMILY, ROLES[role], vocab_size=rows), root / "hf" / f"{role} {rows}")
        model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return root


@pytest.fixture(scope="module")
def samples(root: Path) -> list[dict[str, Tensor]]:
    return run_ranks(2, train, str(root))[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses(name: str, root: Path, samples: list[dict[str, Tensor]]) -> None:
    models = [tiny.make_model(FAMILY, seed, vocab_size=r) for seed, r in zip(ROLES.values(), ROWS[name], strict=True)]
    want = plain_loop(name, *models, samples)
    got = [json.loads(line) for line in (root / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]
    assert len(got) == len(want) == STEPS
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-4, abs=1e-9), f"step {step} {key}"
    assert want[-1]["loss"] < want[0]["loss"] - 0.01, "the models must have learnt something"
