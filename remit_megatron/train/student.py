"""The model that trains, on one rank, with its optimizer."""

from pathlib import Path
from typing import Any

from remit_megatron.config import Recipe
from remit_megatron.mcore import dist_checkpoint, optim
from remit_megatron.run.models import DTYPES


class Student:
    """Model chunks in Megatron's data-parallel wrapper, their optimizer and its schedule."""

    def __init__(self, recipe: Recipe, chunks: list[Any], config: Any, precision: str):
        """chunks: bare, with the weights to begin with; their optimizer's state is fresh."""
        self._gathers_late = recipe.parallel.overlap_param_gather
        self._clip = recipe.optimizer.clip_grad_norm
        self.chunks: list[Any] = optim.wrap_ddp(chunks, config, recipe.parallel)
        self.optimizer, self.scheduler = optim.build_optimizer(
            self.chunks, recipe.optimizer, recipe.schedule, recipe.parallel, DTYPES[precision]
        )

    def load(self, path: Path) -> None:
        """Weights and optimizer state of a checkpoint. Collective. Raises DamagedError."""
        dist_checkpoint.load_training(path, self.chunks, self.optimizer)

    def advance(self, tokens: int) -> None:
        """Set the learning rate for what comes after so many tokens of the run."""
        optim.advance(self.scheduler, tokens)

    def begin_step(self) -> None:
        """Ready for the gradients of a step."""
        optim.zero_grads(self.chunks, self.optimizer)

    def update(self) -> tuple[bool, float]:
        """(whether the weights were updated, norm of the gradient). Not where that norm is not finite. Collective."""
        return optim.optimizer_step(self.optimizer, self._clip)

    def learning_rate(self) -> float:
        return optim.learning_rate(self.scheduler)

    def complete(self) -> list[Any]:
        """The chunks with all their weights. Collective.

        With overlapped gathering, weights are complete only once their next forward pass has asked for them.
        """
        if self._gathers_late:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        return self.chunks
