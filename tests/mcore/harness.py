"""Trains the same global batches in any layout and returns what every token got, for the parity tests."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from remit_megatron.config import Optimizer, Parallel, Schedule
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.mcore import dist_checkpoint, optim
from remit_megatron.mcore.groups import destroy_groups, initialize_groups
from remit_megatron.mcore.loss_hook import unwrap
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.mcore.passes import run_schedule
from remit_megatron.mcore.platform import activate
from remit_megatron.mcore.step import make_forward_step
from remit_megatron.objectives import TokenStats, build_objective
from remit_megatron.ops.top_tokens import TopTokens
from remit_megatron.shape import ModelShape
from remit_megatron.train.metrics import read, reduce_reports
from tests.objectives.around import Around

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
    top_k: int = 0
    """Above 0: the batches carry distributions of which so many tokens are kept, the same in every layout."""


def global_batches() -> list[Microbatch]:
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
            Microbatch(
                tokens=tokens,
                labels=text[:, 1:].contiguous(),
                loss_mask=(torch.rand(SAMPLES, SEQUENCE, generator=generator) < density).float(),
                segment_ids=ends.cumsum(1),
                documents=ends.cumsum(1) - ends.long(),
                sample_id=step * SAMPLES + torch.arange(SAMPLES),
            )
        )
    return batches


def local_microbatches(batch: Microbatch, rank: int, size: int, documents: bool) -> list[Microbatch]:
    """The rank's turns of MICROBATCH samples each."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    parts = {key: value.split(MICROBATCH) for key, value in fields.items() if value is not None}
    if not documents:
        del parts["documents"]
    return [
        Microbatch(**{key: value[i] for key, value in parts.items()}) for i in range(rank, len(parts["tokens"]), size)
    ]


def with_kept(microbatch: Microbatch, top_k: int, groups: Any) -> Microbatch:
    """With invented distributions, which follow from the samples' identities; this rank's positions of them."""
    parts = []
    for sample in ids_of(microbatch):
        generator = torch.Generator().manual_seed(sample)
        logits = 2 * torch.randn(SEQUENCE, STUDENT.vocab_size, generator=generator)
        log_q, ids = logits.log_softmax(-1).sort(dim=-1, descending=True)
        entropy = -(log_q.exp() * log_q).sum(-1)
        parts.append((ids[:, :top_k], log_q[:, :top_k], log_q[:, top_k:].logsumexp(-1), entropy))
    ids, log_probs, log_tail, entropy = (groups.deal().cut(torch.stack(part)) for part in zip(*parts, strict=True))
    agrees = (ids[..., 0] == groups.deal().cut(microbatch.labels)).float()
    top = TopTokens(ids=ids.int(), log_probs=log_probs, log_tail=log_tail)
    return microbatch.with_scores(Scores(entropy=entropy, agrees=agrees, top=top))


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


class Recorder(Around):
    """An objective that also keeps what it saw, nll and ref_nll, and the weights it used, a microbatch each."""

    def __init__(self, inner: Any):
        super().__init__(inner)
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, stats: TokenStats) -> Any:
        record = {"nll": stats.nll.detach().clone(), "mask": stats.mask}
        if stats.ref_nll is not None:
            record["ref_nll"] = stats.ref_nll
        if stats.kl is not None:
            record["kl"] = stats.kl.detach().clone()
        if stats.routed is not None:
            assert stats.ref_entropy is not None
            record |= {"chosen": stats.routed.chosen, "compared": stats.routed.compared, "entropy": stats.ref_entropy}
        result = self.inner(stats)
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
    build = dataclasses.replace(BUILD, recompute=layout.recompute)
    chunks, config = build_chunks(case.student, parallel, build, max_sequence_length=SEQUENCE)
    dist_checkpoint.load_model(folder / ("tied" if case.student == TIED else "student"), chunks)
    objective = Recorder(build_objective(dict(case.objective)))
    reference: list[Any] = []
    if objective.needs_reference and not case.top_k:
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
        if case.top_k:
            batches = [with_kept(one, case.top_k, groups) for one in batches]
        objective.seen.clear()
        optim.zero_grads(chunks, optimizer)
        batches = step.selected(step.scored(batches), chunks)
        reports = run_schedule(step, batches, chunks, forward_only=False)
        ratios, _ = reduce_reports(reports, groups.counts_loss, [], BUILD.device, declared=objective.metrics)
        _, grad_norm = optim.optimizer_step(optimizer, settings.clip_grad_norm)
        optim.advance(scheduler, (number + 1) * SAMPLES * SEQUENCE)
        steps.append({**read(ratios), "grad_norm": grad_norm})
        if groups.counts_loss:
            tokens += [
                {"sample_id": ids_of(b), "cp": groups.cp.rank(), **{k: v.numpy() for k, v in r.items()}}
                for b, r in zip(batches, objective.seen, strict=True)
            ]
    calls = sum(unwrap(chunk).loss_calls for chunk in chunks)
    dist.barrier()
    destroy_groups()
    return {"steps": steps, "tokens": tokens, "calls": calls, "last": groups.is_last_stage}


def ids_of(microbatch: Microbatch) -> list[int]:
    assert microbatch.sample_id is not None
    return [int(one) for one in microbatch.sample_id]


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
