"""Checkpoints between Megatron-LM and this package: both write Megatron's distributed format, so no weight is touched.

What Megatron-LM lacks of ours is a manifest and meta.json; what ours lacks of Megatron-LM's is the folder's name, a
tracker file, and in common.pt the arguments and the state of the schedule.
"""

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import Recipe, load_recipe
from remit_megatron.convert.place import already_there, check_target, claimed, finish
from remit_megatron.data import checksums
from remit_megatron.data.files import write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.mcore.checkpoint_read import LoadCommon, Reader
from remit_megatron.mcore.megatron_lm import checkpoint as theirs
from remit_megatron.mcore.megatron_lm.shapes import arguments_of
from remit_megatron.run.checkpoint import Meta, describe, read_meta, resolve_checkpoint, write_meta

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's, of how queries, keys and values are interleaved."""


def adopt(checkpoint: Path, vocab_size: int | None = None) -> Meta:
    """Write manifest.json and meta.json into a checkpoint of Megatron-LM; from then on it is one of this package's.

    vocab_size: rows of the vocabulary without padding; default: all. Reads every file for its checksum. Raises
    UserError for a checkpoint that has a meta.json, and for a model that this package does not build.
    """
    folder = theirs.resolve(checkpoint, "CHECKPOINT")
    if (folder / "meta.json").exists():
        raise UserError(f"{folder}: has a meta.json already: nothing is to be done")
    meta = describe(folder, vocab_size)
    Reader(folder).read_metadata()
    with writing(folder):
        files = [path for path in folder.iterdir() if path.is_file() and path.name != checksums.NAME]
        checksums.write(folder, checksums.of_files(files))
        write_meta(folder, meta)
    return meta


def export(checkpoint: str, target: Path) -> str:
    """Write the new folder `target`, from which Megatron-LM's plain `--load` goes on. Returns what it will find there.

    Of a run's checkpoint that is an iteration with the optimizer's moments and the schedule; of any other the weights
    alone, as a release. Raises UserError for a model that Megatron-LM's gpt_builder does not build.
    """
    path = resolve_checkpoint(checkpoint, "CHECKPOINT")
    meta = read_meta(path)
    arguments = arguments_of(meta.model_shape(), path)
    stored = Reader(path).read_metadata().state_dict_metadata
    with_optimizer = any(name.startswith("optimizer.") for name in stored)
    recipe = _recipe_of(path) if with_optimizer and meta.step else None
    common = LoadCommon().load_common(path)
    if recipe is None:
        common.pop("optimizer", None)
        name, tracked = "release", "release"
    else:
        arguments |= _progress(meta, recipe)
        common["opt_param_scheduler"] = schedule_state(recipe, meta.tokens)
        name, tracked = f"iter_{meta.step:07d}", str(meta.step)
    common |= {
        "args": Namespace(
            **arguments,
            bf16=meta.precision == "bf16",
            ckpt_format="torch_dist",
            no_save_rng=True,
            no_save_optim=recipe is None,
        ),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": meta.step if recipe else 0,
        "num_floating_point_operations_so_far": 0,
    }
    check_target(target)
    with claimed(target) as partial:
        if target.exists():
            raise already_there(target)
        inside = partial / name
        inside.mkdir(parents=True)
        for file in path.iterdir():
            if file.suffix == ".distcp" or file.name in (theirs.METADATA, "metadata.json"):
                _link_or_copy(file, inside / file.name)
        torch.save(common, inside / theirs.COMMON)
        write_atomically(partial / theirs.TRACKER, tracked.encode())
        finish(partial, target)
    if recipe is None:
        return "a release: weights alone"
    kept = "the distributed optimizer's" if meta.distributed_optimizer else "the optimizer's"
    return f"iteration {meta.step} with {kept} moments"


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name on the same file system: neither program writes into a shard again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _recipe_of(checkpoint: Path) -> Recipe | None:
    """The recipe of the run whose checkpoint it is; None where it does not lie in a run folder."""
    path = checkpoint.resolve().parent.parent / "recipe.toml"
    return load_recipe(path) if path.exists() and checkpoint.resolve().parent.name == "checkpoints" else None


def _progress(meta: Meta, recipe: Recipe) -> dict[str, Any]:
    """Arguments that Megatron-LM goes on by."""
    length, parallel = recipe.data.sequence_length, recipe.parallel
    return {
        "iteration": meta.step,
        "seq_length": length,
        "max_position_embeddings": length,
        "consumed_train_samples": meta.step * (recipe.batch.global_batch_tokens // length),
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "global_batch_size": recipe.batch.global_batch_tokens // length,
        "micro_batch_size": recipe.batch.microbatch_samples,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "use_distributed_optimizer": meta.distributed_optimizer,
    }


def schedule_state(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """What Megatron's OptimizerParamScheduler saves, in Megatron-LM's unit, the sample."""
    length, optimizer, schedule = recipe.data.sequence_length, recipe.optimizer, recipe.schedule
    return {
        "max_lr": optimizer.peak_lr,
        "min_lr": optimizer.min_lr,
        "lr_warmup_steps": schedule.warmup_tokens // length,
        "lr_decay_steps": schedule.train_tokens // length,
        "lr_decay_style": "WSD" if schedule.decay == "wsd" else schedule.decay,
        "num_steps": tokens // length,
        "start_wd": optimizer.weight_decay,
        "end_wd": optimizer.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": schedule.train_tokens // length,
    }


def describe_adopted(meta: Meta) -> str:
    """One line of what `adopt` found."""
    shape = meta.model_shape()
    model = f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.vocab_size} rows of the vocabulary"
    return f"step {meta.step}, {model}, {meta.precision}"
