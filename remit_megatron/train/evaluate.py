"""Held-out NLL of the model in training."""

from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.mcore import datasets
from remit_megatron.mcore.groups import Groups
from remit_megatron.mcore.step import make_forward_step, run_schedule
from remit_megatron.objectives import NTP
from remit_megatron.train.metrics import read, reduce_reports


class Evaluator:
    """Mean NLL in nats over the first samples of each held-out set, whatever the layout."""

    def __init__(self, recipe: Recipe, groups: Groups, vocab_size: int, tokenizer_hash: str | None):
        self.recipe = recipe
        self.groups = groups
        self.sets = {
            name: datasets.HeldOut(
                datasets.open_source(path, recipe.data, vocab_size, tokenizer_hash),
                recipe.data,
                recipe.evaluation.samples,
            )
            for name, path in recipe.data.eval.items()
        }

    @torch.no_grad()
    def run(self, chunks: list[Any], device: torch.device) -> dict[str, float]:
        """`eval/<name>/nll` of each set. Collective."""
        results = {}
        for chunk in chunks:
            chunk.eval()
        for name, held_out in self.sets.items():
            results[f"eval/{name}/nll"] = self._nll(held_out, chunks, device)
        for chunk in chunks:
            chunk.train()
        return results

    def _nll(self, held_out: datasets.HeldOut, chunks: list[Any], device: torch.device) -> float:
        samples, dp = self.recipe.batch.microbatch_samples, self.groups.dp
        count = -(-held_out.length // (samples * dp.size()))
        stages = self.recipe.parallel.pipeline
        if self.recipe.parallel.virtual_pipeline > 1:  # the interleaved schedule takes whole rounds only
            count = -(-count // stages) * stages
        batches = datasets.microbatches(held_out, 0, count, samples, dp.rank(), dp.size())
        step = make_forward_step(NTP(), groups=self.groups)
        reports = run_schedule(step, batches, chunks, forward_only=True)
        ratios, _ = reduce_reports(reports, self.groups.counts_loss, [], device)
        return read(ratios)["nll"]
