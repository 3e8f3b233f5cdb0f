"""The scorer: scores of given samples under the reference, in any layout, as a cache stores them."""

import math
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.config import Recipe
from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.data.steps import stack
from remit_megatron.errors import UserError
from remit_megatron.mcore import passes
from remit_megatron.mcore.datasets import TrainingData
from remit_megatron.mcore.graph import Replayed
from remit_megatron.ops.score_quanta import QUANTA_PER_NAT, quantise
from remit_megatron.ops.shard import IGNORED_LABEL
from remit_megatron.run.build_plan import BuildPlan
from remit_megatron.run.prepare import Ready
from remit_megatron.run.process import from_rank_0, largest_of_ranks
from remit_megatron.run.reference import Reference
from remit_megatron.scores.cache import ScoreCache, with_block_samples
from remit_megatron.scores.manifest import CacheManifest, KeptDistribution, SourceScores
from remit_megatron.scores.record import num_planes, to_planes

SampleNumber = tuple[int, int]
"""Source and number of the sample in it."""
MEAN_ERROR_NATS = {"fp32": 1e-3, "bf16": 0.02, "fp8": 0.1}
"""What re-scoring may differ by from stored scores, in the mean: half a quantum (1.2e-4 in the mean), and the round-off
of another layout or microbatch in the precision. Scores of another model or of other tokens differ by tenths."""


class ScoreError(NamedTuple):
    """Of stored scores against new ones, over unmasked tokens."""

    mean_nats: float
    largest_nats: float
    tokens: int


def cache_manifest(ready: Ready) -> CacheManifest:
    """What the scores that this recipe needs would be."""
    return manifest_of(ready.recipe, ready.plan, ready.data, ready.tokenizer)


def manifest_of(recipe: Recipe, plan: BuildPlan, data: TrainingData, tokenizer: str | None) -> CacheManifest:
    """The same, where no rank has started."""
    assert recipe.reference is not None
    assert plan.reference_identity is not None
    settings = recipe.data
    masked = settings.document_mask or settings.eod_mask_loss
    manifest = CacheManifest(
        reference=plan.reference_identity,
        precision="fp8" if recipe.reference.precision == "fp8" else plan.precision,
        tokenizer=tokenizer,
        sequence_length=settings.sequence_length,
        data_seed=settings.seed,
        document_mask=settings.document_mask,
        eod_mask_loss=settings.eod_mask_loss,
        eod_id=data.eod_id if masked else None,
        block_samples=1,
        distribution=kept_distribution(recipe, plan),
        sources=tuple(
            SourceScores(fingerprint=source.info.fingerprint, samples=count)
            for source, count in zip(data.sources, data.order.needed(), strict=True)
        ),
    )
    return with_block_samples(manifest)


def kept_distribution(recipe: Recipe, plan: BuildPlan) -> KeptDistribution | None:
    """What a recipe keeps of the reference's distributions."""
    if recipe.reference is None or not recipe.reference.distribution:
        return None
    assert plan.reference_shape is not None
    return KeptDistribution(
        top_k=recipe.reference.distribution,
        temperature=recipe.objective.distribution.temperature,
        vocab_size=plan.reference_shape.vocab_size,
    )


class Scored(NamedTuple):
    """What a reference says of samples, on the CPU: whole on the last stage's ranks, 0 elsewhere."""

    nll: Tensor
    """[n, s] float32 nats."""
    mask: Tensor
    """[n, s] float32."""
    planes: Tensor | None
    """[P, n, s] int32 of the distribution, as `record.to_planes` makes them; None where it is not kept."""


class Scorer:
    """Runs the reference forward-only over chosen samples. Methods are collective."""

    def __init__(self, ready: Ready, reference: Reference):
        settings, p = ready.recipe.reference, ready.recipe.parallel
        assert settings is not None
        self.ready = ready
        self.reference = reference
        self.groups = ready.groups
        self._deal = ready.deal
        self._merge = settings.merge_microbatches
        self._kept = kept_distribution(ready.recipe, ready.plan)
        self._graph = Replayed() if settings.cuda_graph else None
        # An interleaved schedule takes whole rounds of microbatches only, and merged ones must be of one size.
        self._round = self._merge * (p.pipeline if p.virtual_pipeline > 1 else 1)

    @property
    def round_samples(self) -> int:
        """Samples that all data-parallel ranks score together; a multiple of it wastes nothing."""
        return self._deal.turn_samples * self._round

    def score(self, samples: Sequence[SampleNumber]) -> Scored:
        """Of samples, everything that the recipe keeps."""
        data, deal, device, kept = self.ready.data, self._deal, self.reference.device, self._kept
        microbatches = []
        for rows in deal.microbatches(deal.num_microbatches(len(samples), round_of=self._round)):
            chosen = [samples[min(row, len(samples) - 1)] for row in rows]
            microbatches.append(stack([data.sample_of(*one) for one in chosen]))
        scores = self._scores(microbatches)
        length = self.ready.recipe.data.sequence_length
        whole = torch.zeros(2 + num_planes(kept), len(samples), length, dtype=torch.int32, device=device)
        if self.groups.is_last_stage:
            masks = [deal.cut(one.loss_mask.to(device)).int() for one in microbatches]
            parts = [_bits(*pair) for pair in zip(scores, masks, strict=True)]
            deal.collect(parts, whole, lambda x: dist.all_reduce(x, group=self.groups.dp_cp))
        whole = whole.cpu()
        return Scored(whole[0].view(torch.float32), whole[1].float(), whole[2:] if kept else None)

    def _scores(self, microbatches: Sequence[Microbatch]) -> list[Scores]:
        """Of this rank's positions of each microbatch; none on ranks of other stages than the last."""
        chunks, groups, kept = self.reference.chunks, self.groups, self._kept
        if kept is None:
            nll = passes.nll(chunks, microbatches, groups, merge=self._merge, graph=self._graph)
            return [Scores(ref_nll=one) for one in nll]
        hidden = passes.hidden(chunks, microbatches, groups, merge=self._merge)
        if not groups.is_last_stage:
            return []
        labels = [one.labels.masked_fill(one.loss_mask == 0, IGNORED_LABEL) for one in microbatches]
        mine = [self._deal.cut(one).to(self.reference.device) for one in labels]
        return passes.summaries(chunks, hidden, mine, top_k=kept.top_k, temperature=kept.temperature)

    def compare(self, cache: ScoreCache, samples: Sequence[SampleNumber]) -> ScoreError:
        """Error of stored scores, on every rank; NaN where the reference gives an unmasked token none."""
        nll, mask, _ = self.score(samples)
        quanta = quantise(nll)
        stored = torch.from_numpy(np.stack([cache.quanta(s, k).astype(np.int32) for s, k in samples]))
        error = (quanta - stored).abs().double() / QUANTA_PER_NAT
        error = error.masked_fill(quanta < 0, math.nan).masked_fill(mask == 0, 0.0)
        if not self.groups.counts_loss:
            error, mask = torch.zeros_like(error), torch.zeros_like(mask)
        sums = torch.stack([error.sum(), mask.double().sum()]).to(self.reference.device)
        largest = largest_of_ranks(error.amax().to(self.reference.device))
        dist.all_reduce(sums)
        total, tokens = (sums / self.groups.dp_cp.size()).tolist()  # each slice of the batch has counted the whole
        return ScoreError(total / max(tokens, 1), largest, int(tokens))

    def check(self, cache: ScoreCache, number: int) -> ScoreError:
        """`compare` so many samples, other ones at each start. Raises UserError where their stored scores are not this
        reference's."""
        seed = from_rank_0(lambda: secrets.randbits(32), self.reference.device)
        samples = random_samples(self.ready.data.order.needed(), number, seed)
        error = self.compare(cache, samples)
        if not math.isfinite(error.mean_nats):
            raise UserError(
                f"reference.path: its score of a token among {len(samples)} samples is not a number: a weight of "
                f"{self.ready.plan.reference_path} is broken, or its precision is"
            )
        allowed = MEAN_ERROR_NATS[cache.manifest.precision]
        if not error.mean_nats <= allowed:
            raise UserError(
                f"{cache.key}: the scores in {cache.folder} are not those of reference.path: scored again, "
                f"{len(samples)} samples differ by {error.mean_nats:.2g} nats in the mean (allowed: {allowed:g}); run "
                "`remit score` into another folder"
            )
        return error


def _bits(scores: Scores, mask: Tensor) -> Tensor:
    """[2 + P, b, s/cp] int32: the bits of the NLL, the mask, and what is kept of the distribution."""
    assert scores.ref_nll is not None, "a scorer scores labels"
    both = torch.stack([scores.ref_nll.contiguous().view(torch.int32), mask])
    return both if scores.top is None else torch.cat([both, to_planes(scores)])


def random_samples(counts: Sequence[int], number: int, seed: int) -> list[SampleNumber]:
    """`number` samples, at most all, drawn without repetition from sources with so many samples each."""
    generator = np.random.default_rng(seed)
    total = sum(counts)
    drawn: Any = np.sort(generator.choice(total, size=min(number, total), replace=False))
    ends = np.cumsum(counts)
    sources = np.searchsorted(ends, drawn, side="right")
    return [(int(s), int(n - (ends[s] - counts[s]))) for s, n in zip(sources, drawn, strict=True)]
