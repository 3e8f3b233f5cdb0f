"""What a checkpoint says of the run it belongs to, and whether a start goes on with that run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from remit_megatron.data.tokenizer import same_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.run.checkpoint import Meta, read_meta
from remit_megatron.run.folder import settings_digest
from remit_megatron.run.prepare import Ready

SAME = ("shape", "tokenizer", "distributed_optimizer", "precision", "reference")
"""Fields of Meta that a start must have in common with its checkpoint, and datasets, and settings of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands at a start."""

    meta: Meta
    """Before its first step, or that of the checkpoint that it goes on from, brought up to this start."""
    replaced: tuple[str, ...] = ()
    """Held-out sets that are others than those of the checkpoint, by name."""
    remarks: tuple[str, ...] = ()
    """What to say of it, a line each."""


def begin_or_resume(ready: Ready, held_out: Mapping[str, str]) -> Standing:
    """Where the run stands.

    held_out: content of the held-out sets by name. Raises UserError where the checkpoint to go on from is of another
    run.
    """
    fresh, path = _fresh(ready, held_out), ready.plan.resume
    return Standing(meta=fresh) if path is None else _resumed(path, read_meta(path), fresh)


def _fresh(ready: Ready, held_out: Mapping[str, str]) -> Meta:
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
        skipped=0,
        settings=settings_digest(recipe),
        held_out=dict(held_out),
    )


def _resumed(path: Path, saved: Meta, fresh: Meta) -> Standing:
    for key in SAME:
        was, found = getattr(saved, key), getattr(fresh, key)
        if was != found and not (key == "tokenizer" and was and found and same_tokenizer(was, found)):
            raise UserError(
                f"checkpoint {path}: its {key} is {was}, this start has {found}: restore what changed, or start "
                "another run folder"
            )
    # By content, in the order of data.train: the same data may have come to lie elsewhere.
    if list(saved.data.values()) != list(fresh.data.values()):
        raise UserError(
            f"checkpoint {path}: its data is {saved.data}, this start has {fresh.data}: restore what changed, or start "
            "another run folder"
        )
    _check_settings(path, saved, fresh)
    replaced = _replaced(saved.held_out or {}, fresh.held_out or {})
    remarks = [
        f"warning: data.eval.{name} is another set, or has another number of samples, than before step {saved.step}: "
        f"eval/{name}/nll does not go on; the next one is marked with eval/{name}/replaced in metrics.jsonl"
        for name in replaced
    ]
    if saved.held_out is None or saved.settings is None:
        remarks.append(
            f"checkpoint {path.name} is of a version that did not say which settings and held-out sets it belongs to: "
            "those of this start are taken for them from here on"
        )
    meta = replace(
        saved,
        data=fresh.data,
        skipped=saved.skipped or 0,
        settings=fresh.settings,
        held_out={**(saved.held_out or {}), **(fresh.held_out or {})},
        manifest=None,
    )
    return Standing(meta=meta, replaced=replaced, remarks=tuple(remarks))


def _check_settings(path: Path, saved: Meta, fresh: Meta) -> None:
    bound = saved.settings is not None
    if (saved.settings != fresh.settings) if bound else (saved.recipe != fresh.recipe):
        remedy = "" if bound else " (with all settings as they were when it was written, until its next checkpoint)"
        raise UserError(
            f"checkpoint {path} was trained with another recipe than this run's recipe.toml: restore the run's own "
            f"checkpoints{remedy}, or start another run folder"
        )


def _replaced(saved: Mapping[str, str], fresh: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in fresh if saved.get(name, fresh[name]) != fresh[name])
