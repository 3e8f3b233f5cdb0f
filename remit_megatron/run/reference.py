"""The co-located reference: a frozen model in the student's own tensor, pipeline and context parallel groups.

It has its own config (depth and width may differ from the student's), no DDP, no optimizer state, and never
materialises logits. `remit_megatron.mcore.step` runs it forward-only before each training step.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Parallel
from remit_megatron.errors import RunError, UserError
from remit_megatron.mcore import dist_checkpoint, fp8
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.shape import ModelShape


class Reference:
    """A frozen model with the weights of a checkpoint; `chunks` are this rank's."""

    def __init__(
        self,
        shape: ModelShape,
        path: Path,
        parallel: Parallel,
        build: Build,
        *,
        max_sequence_length: int,
        precision: str = "same",
    ):
        """Build and load. Collective. Raises UserError when a weight is still at its initial value after loading, and
        for precision = "fp8" where that cannot run."""
        self.device = build.device
        self.chunks: list[Any]
        self.chunks, _ = build_chunks(shape, parallel, build, max_sequence_length=max_sequence_length, scorer=True)
        before = dist_checkpoint.first_rows(self.chunks)
        dist_checkpoint.load_model(path, self.chunks)
        untouched = dist_checkpoint.unchanged_matrices(self.chunks, before)
        if self._anywhere(bool(untouched)):
            raise UserError(f"reference.path: {path} left weights at their initial values: {', '.join(untouched[:3])}")
        self._checksum = dist_checkpoint.weights_checksum(self.chunks)
        self.products: list[fp8.Fp8Product] = []
        if precision == "fp8":
            self.products = fp8.quantise(self.chunks, build.device, build.dtype, build.loss_implementation)

    def verify_frozen(self) -> None:
        """Collective. Raises RunError when the weights are not, bit for bit, those that were loaded."""
        if self._anywhere(dist_checkpoint.weights_checksum(self.chunks) != self._checksum):
            raise RunError("the reference's weights have changed during the run: its scores are not its own any more")

    def _anywhere(self, condition: bool) -> bool:
        flag = torch.tensor([float(condition)], device=self.device)
        dist.all_reduce(flag)
        return bool(flag.item())
