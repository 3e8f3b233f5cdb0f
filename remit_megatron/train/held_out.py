"""Held-out NLL of the model that trains, in any layout."""

from typing import Any

import torch

from remit_megatron.config import Recipe
from remit_megatron.mcore import datasets
from remit_megatron.mcore.groups import Groups
from remit_megatron.mcore.passes import run_schedule
from remit_megatron.mcore.step import make_forward_step
from remit_megatron.objectives import NTP
from remit_megatron.run.dealt import DealtSamples
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
        self.replaced: tuple[str, ...] = ()
        """Sets that hold something else than before the run was interrupted: their next line says so."""

    @property
    def content(self) -> dict[str, str]:
        """What each set's figure is of, by name: fingerprint and number of samples."""
        return {name: f"{one.source.info.fingerprint}/{one.length}" for name, one in self.sets.items()}

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document in the held-out sets; None where there is no set, or it names none."""
        return next((held_out.eod_id for held_out in self.sets.values()), None)

    @torch.no_grad()
    def run(self, chunks: list[Any], device: torch.device) -> dict[str, float]:
        """`eval/<name>/nll` of each set; `eval/<name>/replaced` = 1 at its first after the set was another one.
        Collective."""
        for chunk in chunks:
            chunk.eval()
        results = {}
        for name, held_out in self.sets.items():
            nll = self._nll(held_out, chunks, device)
            if nll is not None:
                results[f"eval/{name}/nll"] = nll
        for chunk in chunks:
            chunk.train()
        results |= {f"eval/{name}/replaced": 1 for name in self.replaced if f"eval/{name}/nll" in results}
        self.replaced = ()
        return results

    def _nll(self, held_out: datasets.HeldOut, chunks: list[Any], device: torch.device) -> float | None:
        """None where the mask keeps no token."""
        dealt = DealtSamples(self.recipe, held_out, self.groups, device)
        # As an objective, not by passes.nll: a head that forms logits by sequence is evaluated as it trains.
        step = make_forward_step(NTP(), groups=self.groups)
        reports = run_schedule(step, dealt.microbatches(0, dealt.count), chunks, forward_only=True)
        ratios, _ = reduce_reports(reports, self.groups.counts_loss, [], device)
        return read(ratios).get("nll")
