"""Former entry points over the ones that took their place, until their callers have moved."""

import dataclasses
from typing import Any

from torch import Tensor

from remit_megatron.data.microbatch import Microbatch, Scores
from remit_megatron.mcore import passes


def convert(step: Any, batch: dict[str, Any]) -> Microbatch:
    batch = dict(batch)
    found = {name: batch.pop(key, None) for name, key in (("ref_nll", "ref_nll_local"), ("hidden", "ref_hidden_local"))}
    selected = batch.pop("selected_local", None)
    if found["ref_nll"] is not None:
        batch.pop("ref_nll", None)
    microbatch = Microbatch.from_dict(batch, step._deal)
    if any(one is not None for one in found.values()):
        microbatch = microbatch.with_scores(dataclasses.replace(microbatch.scores or Scores(), **found))
    return microbatch.with_selected(selected)


def run_schedule(forward_step: Any, batches: Any, chunks: Any, *, forward_only: bool) -> Any:
    if isinstance(batches[0], dict):
        batches = [convert(forward_step, one) for one in batches]
    return passes.run_schedule(forward_step, batches, chunks, forward_only=forward_only)


class Former:
    def score(self: Any, batches: list[dict[str, Any]]) -> None:
        microbatches = [convert(self, one) for one in batches]
        for batch, before, after in zip(batches, microbatches, self.scored(microbatches), strict=True):
            if after.scores is not None and after.scores is not before.scores:
                for key, value in (("ref_nll_local", after.scores.ref_nll), ("ref_hidden_local", after.scores.hidden)):
                    if value is not None:
                        batch[key] = value

    def select(self: Any, batches: list[dict[str, Any]], chunks: list[Any]) -> None:
        for batch, after in zip(batches, self.selected([convert(self, one) for one in batches], chunks), strict=True):
            if after.selected is not None:
                batch["selected_local"] = after.selected

    def nll_of(self: Any, chunks: list[Any], batches: list[Any], graph: Any = None) -> list[Tensor]:
        microbatches = [one if isinstance(one, Microbatch) else convert(self, one) for one in batches]
        return passes.nll(chunks, microbatches, self.groups, merge=self.reference.merge_microbatches, graph=graph)

    def nll_and_kl_of(self: Any, chunks: list[Any], batches: list[Any]) -> list[Tensor]:
        microbatches = [one if isinstance(one, Microbatch) else convert(self, one) for one in batches]
        reference, how = self.reference, self.objective.distribution
        return passes.nll_and_kl(
            chunks,
            reference.chunks,
            microbatches,
            self.groups,
            merge=reference.merge_microbatches,
            temperature=how.temperature,
            top_k=how.top_k,
        )

    def local_batch(self: Any, batch: Any, model: Any) -> Any:
        return self.local(batch if isinstance(batch, Microbatch) else convert(self, batch), model)
