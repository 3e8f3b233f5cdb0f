"""Trains the same global batches in any layout and returns what every token got, for the parity tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.config import Optimizer, Parallel, Schedule
from remit_megatron.mcore import dist_checkpoint, optim
from remit_megatron.mcore.groups import destroy_groups, initialize_groups
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.mcore.platform import activate
from remit_megatron.mcore.step import make_forward_step, run_schedule, unwrap
from remit_megatron.objectives import TokenStats, build_objective
from remit_megatron.shape import ModelShape
from remit_megatron.train.metrics import read, reduce_reports

SEQUENCE, SAMPLES, MICROBATCH, STEPS, EOD = 16, 8, 2, 3, 0
STUDENT = ModelShape(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,  # odd: tensor parallelism pads it
    tied_embeddings=False,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
)
REFERENCE = STUDENT.model_copy(update={"num_layers": 8, "hidden_size": 24, "kv_channels": 6, "ffn_hidden_size": 40})
TIED = STUDENT.model_copy(update={"tied_embeddings": True})
BUILD = Build(device=torch.device("cpu"), dtype=torch.float32)


@dataclass(frozen=True)
class Layout:
    name: str
    parallel: Parallel = field(default_factory=lambda: Parallel(distributed_optimizer=False))
    recompute: bool = False
    merge_microbatches: int = 1


@dataclass(frozen=True)
class Case:
    """One thing to compare over layouts."""

    name: str
    objective: dict[str, Any]
    student: ModelShape = STUDENT
    document_mask: bool = False


def global_batches() -> list[dict[str, torch.Tensor]]:
    """STEPS global batches [SAMPLES, SEQUENCE] with several documents in a sample and ragged masks."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for step in range(STEPS):
        text = torch.randint(1, STUDENT.vocab_size, (SAMPLES, SEQUENCE + 1), generator=generator)
        text[torch.rand(text.shape, generator=generator) < 0.15] = EOD
        density = torch.rand(SAMPLES, 1, generator=generator)
        density[step] = 0.0  # one sample without any trained token
        tokens = text[:, :-1].contiguous()
        ends = tokens == EOD
        batches.append(
            {
                "tokens": tokens,
                "labels": text[:, 1:].contiguous(),
                "loss_mask": (torch.rand(SAMPLES, SEQUENCE, generator=generator) < density).float(),
                "segment_ids": ends.cumsum(1),
                "documents": ends.cumsum(1) - ends.long(),
                "sample_id": step * SAMPLES + torch.arange(SAMPLES),
            }
        )
    return batches


def local_microbatches(batch: dict[str, torch.Tensor], rank: int, size: int, documents: bool) -> list[Any]:
    parts = {key: value.split(MICROBATCH) for key, value in batch.items() if documents or key != "documents"}
    count = len(parts["tokens"])
    return [{key: value[i] for key, value in parts.items()} for i in range(rank, count, size)]


def randomise(chunks: list[Any]) -> None:
    """Weights that no symmetry of the initialisation hides: norms away from 1, logits of some spread."""
    generator = torch.Generator().manual_seed(3)
    for chunk in chunks:
        for parameter in unwrap(chunk).parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.12 * noise if parameter.ndim > 1 else 1 + 0.2 * noise


def save_initial(folder: Path, shapes: dict[str, ModelShape]) -> None:
    """Weights of each model, written by one rank."""
    initialize_groups(Parallel(), seed=1)
    for name, shape in shapes.items():
        chunks, _ = build_chunks(shape, Parallel(), BUILD, max_sequence_length=SEQUENCE)
        randomise(chunks)
        (folder / name).mkdir(parents=True)
        dist_checkpoint.save(folder / name, chunks, None)
    destroy_groups()


class Recorder:
    """An objective that also keeps what it saw, nll and ref_nll, and the weights it used, a microbatch each."""

    def __init__(self, objective: Any):
        self.objective = objective
        self.needs_reference = objective.needs_reference
        self.name = objective.name
        self.global_share = getattr(objective, "global_share", None)
        self.needs_reference_hidden = getattr(objective, "needs_reference_hidden", False)
        self.temperature = getattr(objective, "temperature", None)
        self.top_k = getattr(objective, "top_k", 0)
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, stats: TokenStats) -> Any:
        record = {"nll": stats.nll.detach().clone(), "mask": stats.mask}
        if stats.ref_nll is not None:
            record["ref_nll"] = stats.ref_nll
        if stats.kl is not None:
            record["kl"] = stats.kl.detach().clone()
        result = self.objective(stats)
        if stats.ref_nll is not None:
            record["weight"] = gradient_at(result.loss_sum, stats.nll)
        self.seen.append(record)
        return result


def gradient_at(loss_sum: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """What each token counts for in the loss."""
    return torch.autograd.grad(loss_sum, nll, retain_graph=True)[0]


def train_case(case: Case, layout: Layout, folder: Path) -> dict[str, Any]:
    """Train STEPS steps. Returns steps (loss, nll, grad_norm, ...) and this rank's tokens."""
    parallel = layout.parallel
    groups = initialize_groups(parallel, seed=1)
    build = Build(device=BUILD.device, dtype=BUILD.dtype, recompute=layout.recompute)
    chunks, config = build_chunks(case.student, parallel, build, max_sequence_length=SEQUENCE)
    dist_checkpoint.load_model(folder / ("tied" if case.student is TIED else "student"), chunks)
    objective = Recorder(build_objective(dict(case.objective)))
    reference: list[Any] = []
    if objective.needs_reference:
        reference, _ = build_chunks(REFERENCE, parallel, BUILD, max_sequence_length=SEQUENCE, scorer=True)
        dist_checkpoint.load_model(folder / "reference", reference)
    chunks = optim.wrap_ddp(chunks, config, parallel)
    settings = Optimizer(peak_lr=1e-2, min_lr=1e-3)
    schedule = Schedule(train_tokens=10 * SAMPLES * SEQUENCE)
    optimizer, scheduler = optim.build_optimizer(chunks, settings, schedule, parallel, BUILD.dtype)
    step = make_forward_step(objective, reference, groups=groups, merge_microbatches=layout.merge_microbatches)

    steps, tokens = [], []
    for number, batch in enumerate(global_batches()):
        batches = local_microbatches(batch, groups.dp.rank(), groups.dp.size(), case.document_mask)
        objective.seen.clear()
        optim.zero_grads(chunks, optimizer)
        if objective.needs_reference:
            step.score(batches)
        step.select(batches, chunks)
        reports = run_schedule(step, batches, chunks, forward_only=False)
        ratios, _ = reduce_reports(reports, groups.counts_loss, [], BUILD.device)
        _, grad_norm = optim.optimizer_step(optimizer, settings.clip_grad_norm)
        optim.advance(scheduler, (number + 1) * SAMPLES * SEQUENCE)
        steps.append({**read(ratios), "grad_norm": grad_norm})
        if groups.counts_loss:
            tokens += [
                {"sample_id": b["sample_id"].tolist(), "cp": groups.cp.rank(), **{k: v.numpy() for k, v in r.items()}}
                for b, r in zip(batches, objective.seen, strict=True)
            ]
    calls = sum(unwrap(chunk).loss_calls for chunk in chunks)
    dist.barrier()
    destroy_groups()
    return {"steps": steps, "tokens": tokens, "calls": calls, "last": groups.is_last_stage}


def assemble(results: list[dict[str, Any]], context: int) -> dict[str, np.ndarray]:
    """Every token's nll, ref_nll and weight, [STEPS * SAMPLES, SEQUENCE], from all ranks' records."""
    positions = np.arange(SEQUENCE).reshape(2 * context, -1)
    table: dict[str, np.ndarray] = {}
    for result in results:
        for record in result["tokens"]:
            keep = np.concatenate([positions[record["cp"]], positions[2 * context - 1 - record["cp"]]])
            for key, values in record.items():
                if key in ("sample_id", "cp"):
                    continue
                whole = table.setdefault(key, np.full((STEPS * SAMPLES, SEQUENCE), np.nan, dtype=np.float64))
                whole[np.ix_(record["sample_id"], keep)] = values
    return table


def on_rank(rank: int, folder: str, cases: list[Case], layouts: list[Layout]) -> dict[str, Any]:
    """All cases in all layouts of one world size, in one spawn."""
    activate("cpu")
    return {
        f"{layout.name} {case.name}": train_case(case, layout, Path(folder)) for layout in layouts for case in cases
    }
