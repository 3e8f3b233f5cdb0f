"""What happens to single tokens: NLL, reference and weight of a few fixed held-out samples, kept as Parquet.

RUN/tokens/step-00000100.parquet has a row a token: step, sample (of the held-out set), position, token (the id that is
predicted there), nll, ref_nll, weight, mask. ref_nll is null without a reference, weight where an objective has none.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import write_atomically, writing
from remit_megatron.data.steps import stack
from remit_megatron.errors import RunError, UserError
from remit_megatron.mcore import datasets, passes
from remit_megatron.mcore.groups import Groups
from remit_megatron.objectives import Need, Objective, TokenStats
from remit_megatron.ops.score_quanta import round_to_quanta
from remit_megatron.ops.selection import top_share
from remit_megatron.run.dealt import DealtSamples
from remit_megatron.run.reference import Reference

KEY = "logging.tokens_every_steps"
BINS = 40
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("sample", pa.int32()),
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("nll", pa.float32()),
        ("ref_nll", pa.float32()),
        ("weight", pa.float32()),
        ("mask", pa.bool_()),
    ]
)


class TokenRecords:
    """Records of `logging.tokens_samples` samples. Construction and `record` are collective."""

    def __init__(
        self,
        recipe: Recipe,
        held_out: datasets.HeldOut,
        objective: Objective,
        reference: Reference | None,
        groups: Groups,
        device: torch.device,
    ):
        """The frozen reference is asked here, once, and not kept. Raises UserError where it is needed and not there."""
        self.recipe = recipe
        self.objective = objective
        self.groups = groups
        self.device = device
        self.folder = Path(recipe.run) / "tokens"
        self.count = held_out.length
        self._dealt = DealtSamples(recipe, held_out, groups, device)
        self._samples = stack([held_out.sample(n) for n in range(self.count)])
        self._ref_nll: torch.Tensor | None = None
        if objective.needs_reference:
            if reference is None:
                raise UserError(
                    f"{KEY} needs the reference's scores of held-out samples, and this recipe does not load it: set "
                    "reference.check_samples above 0, or reference.queue.fallback = 'online'"
                )
            scores = self._nll(reference.chunks)
            self._ref_nll = round_to_quanta(scores) if recipe.reference and recipe.reference.rounds else scores

    def resume(self, step: int) -> None:
        """On rank 0: remove what an earlier start has recorded after `step`, which comes again."""
        for path in self.folder.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink(missing_ok=True)

    def record(self, step: int, chunks: list[Any]) -> dict[str, Any]:
        """Write the records of a step, and return the histogram of unmasked tokens' weights for its line of metrics."""
        for chunk in chunks:
            chunk.eval()
        nll = self._nll(chunks)
        for chunk in chunks:
            chunk.train()
        weight = self._weights(step, nll)
        if dist.get_rank() == 0:
            try:
                self._write(step, nll, weight)
            except RunError as error:  # a full disk costs records, not the run
                logging.getLogger(__name__).warning("%s", error)
        kept = self._samples.loss_mask > 0
        if weight is None or not kept.any():
            return {}
        counts, edges = np.histogram(weight[kept].numpy(), bins=BINS, range=(0.0, 2.0))
        return {"token_weights": {"counts": counts.tolist(), "edges": edges.tolist()}}

    def _nll(self, chunks: list[Any]) -> torch.Tensor:
        """[n, s] float32 on the CPU of every rank."""
        microbatches = self._dealt.microbatches(0, self._dealt.count)
        return self._dealt.whole(passes.nll(chunks, microbatches, self.groups))

    def _weights(self, step: int, nll: torch.Tensor) -> torch.Tensor | None:
        """What each token counts for in the objective's loss, [n, s]: the same arithmetic as in training, on these
        samples; tokens that compete over a batch compete over them."""
        if Need.DISTRIBUTION in self.objective.needs:
            return None
        mask, share, selected = self._samples.loss_mask.float(), self.objective.global_share, None
        if Need.GLOBAL_SELECTION in self.objective.needs and share is not None:
            assert self._ref_nll is not None
            gap = nll.double() - self._ref_nll.double()
            selected = top_share(gap, mask, share, scope="microbatch")
        variable = nll.clone().requires_grad_()
        with torch.enable_grad():
            stats = TokenStats(
                nll=variable,
                ref_nll=self._ref_nll,
                mask=mask,
                segment_ids=self._samples.segment_ids,
                sample_id=self._samples.sample_id,
                step=step,
                selected=selected,
            )
            loss = self.objective(stats)
            (weight,) = torch.autograd.grad(loss.loss_sum, variable)
        return weight

    def _write(self, step: int, nll: torch.Tensor, weight: torch.Tensor | None) -> None:
        count, length = nll.shape

        def flat(values: torch.Tensor | None) -> Any:
            return pa.nulls(count * length, pa.float32()) if values is None else values.float().flatten().numpy()

        columns = {
            "step": np.full(count * length, step),
            "sample": np.repeat(np.arange(count, dtype=np.int32), length),
            "position": np.tile(np.arange(length, dtype=np.int32), count),
            "token": self._samples.labels.flatten().int().numpy(),
            "nll": flat(nll),
            "ref_nll": flat(self._ref_nll),
            "weight": flat(weight),
            "mask": (self._samples.loss_mask > 0).flatten().numpy(),
        }
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        sink = pa.BufferOutputStream()
        source = self.recipe.tokens_source
        pq.write_table(pa.table(columns, schema=SCHEMA.with_metadata({"source": source})), sink)
        write_atomically(self.folder / f"step-{step:08d}.parquet", sink.getvalue().to_pybytes())


def open_records(
    recipe: Recipe,
    held_out: dict[str, datasets.HeldOut],
    objective: Objective,
    reference: Reference | None,
    groups: Groups,
    device: torch.device,
) -> TokenRecords | None:
    """None where the recipe wants none. Collective."""
    if not recipe.logging.tokens_every_steps:
        return None
    # The evaluator's set may be limited to fewer samples.
    found = held_out[recipe.tokens_source]
    wanted = datasets.HeldOut(found.source, recipe.data, recipe.logging.tokens_samples)
    return TokenRecords(recipe, wanted, objective, reference, groups, device)
