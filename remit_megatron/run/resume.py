"""What a checkpoint says of the run it belongs to, and whether a start goes on with that run."""

from pathlib import Path

from remit_megatron.errors import UserError
from remit_megatron.run.checkpoint import Meta, read_meta
from remit_megatron.run.prepare import Ready

SAME = ("shape", "data", "tokenizer", "distributed_optimizer", "precision", "reference")
"""Fields of Meta that a start must have in common with its checkpoint; that the recipe is the run's own, the run folder
has shown."""


def begin_or_resume(ready: Ready) -> Meta:
    """Where the run stands: before its first step, or at the checkpoint that it goes on from.

    Raises UserError where that checkpoint is of another run.
    """
    fresh, path = _fresh(ready), ready.plan.resume
    return fresh if path is None else _saved(path, fresh)


def _fresh(ready: Ready) -> Meta:
    recipe, plan = ready.recipe, ready.plan
    sources = zip(recipe.data.train, ready.data.sources, strict=True)
    return Meta(
        shape=plan.shape.model_dump(),
        recipe=recipe.fingerprint(),
        data={source.path: samples.info.fingerprint for source, samples in sources},
        tokenizer=ready.tokenizer,
        distributed_optimizer=recipe.parallel.distributed_optimizer,
        precision=plan.precision,
        reference=plan.reference_identity,
    )


def _saved(path: Path, fresh: Meta) -> Meta:
    saved = read_meta(path)
    for key in SAME:
        if getattr(saved, key) != getattr(fresh, key):
            raise UserError(
                f"checkpoint {path}: its {key} is {getattr(saved, key)}, this start has {getattr(fresh, key)}: "
                "restore what changed, or start another run folder"
            )
    return saved
