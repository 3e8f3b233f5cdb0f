"""Converts the tiny models of tests/hf/tiny.py and runs them in any layout, for tests/mcore/test_families.py.

Folders: hf/NAME as transformers wrote it, checkpoint/NAME imported from it, LAYOUT/NAME loaded and saved again in a
layout, out/LAYOUT/NAME exported from there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.convert.exporter import export_checkpoint
from remit_megatron.convert.importer import import_folder
from remit_megatron.data.microbatch import Microbatch
from remit_megatron.mcore import dist_checkpoint, optim
from remit_megatron.mcore.groups import Groups, destroy_groups, initialize_groups
from remit_megatron.mcore.loss_hook import unwrap
from remit_megatron.mcore.model import build_chunks
from remit_megatron.mcore.passes import run_schedule
from remit_megatron.mcore.platform import activate
from remit_megatron.mcore.step import make_forward_step
from remit_megatron.objectives import NTP
from remit_megatron.run.checkpoint import read_meta, write_meta
from tests.hf import tiny
from tests.mcore.harness import BUILD, REFERENCE, Case, Layout, save_initial, train_case


def import_and_run(rank: int, folder: str, layouts: list[Layout], names: list[str], *rest: Any) -> dict[str, Any]:
    """On one rank, before any other runs: `import_all`, then `on_layouts`."""
    activate("cpu")
    import_all(folder, names)
    return on_layouts(rank, folder, layouts, names, *rest)


def import_all(folder: str, names: list[str]) -> None:
    """hf/NAME -> checkpoint/NAME; and a reference of another family and width, for the training cases."""
    root = Path(folder)
    (root / "checkpoint").mkdir()
    for name in names:
        import_folder(root / "hf" / name, root / "checkpoint" / name, quiet=True)
    save_initial(root, {"reference": REFERENCE})


def export_all(rank: int, folder: str, jobs: list[tuple[str, str]]) -> None:
    """LAYOUT/NAME -> out/LAYOUT/NAME, in small shards, for every (LAYOUT, NAME)."""
    activate("cpu")
    root = Path(folder)
    for layout, name in jobs:
        target = root / "out" / layout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = root / layout / name
        export_checkpoint(str(source), target, root / "hf" / name, max_shard_bytes=9_000, quiet=True)


def on_layouts(
    rank: int, folder: str, layouts: list[Layout], names: list[str], save: list[tuple[str, str]], train: list[str]
) -> dict[str, Any]:
    """For every layout and name: logits and gradients of one NTP step; for names in `train` also ReMiT steps.

    (layout, name) pairs in `save` are written to LAYOUT/NAME as the layout holds them.
    """
    activate("cpu")
    root = Path(folder)
    results: dict[str, Any] = {}
    for layout in layouts:
        groups = initialize_groups(layout.parallel, seed=1)  # once for all models: making them costs a second
        for name in names:
            if name in tiny.ONE_GROUP and layout.parallel.tensor > 1:
                continue
            target = root / layout.name / name if (layout.name, name) in save else None
            results[f"{layout.name} {name}"] = _one_model(root / "checkpoint" / name, layout, target, groups)
        destroy_groups()
        for name in train:
            shape = read_meta(root / "checkpoint" / name).model_shape()
            case = Case("remit", {"name": "remit"}, shape)
            results[f"{layout.name} {name} remit"] = train_case(case, layout, root / "train" / name)
    return results


def prepare_training(folder: Path, names: list[str]) -> None:
    """The folders `student` and `reference` that train_case loads from, for each name."""
    for name in names:
        home = folder / "train" / name
        home.mkdir(parents=True)
        (home / "student").symlink_to(folder / "checkpoint" / name)
        (home / "reference").symlink_to(folder / "reference")


def _one_model(checkpoint: Path, layout: Layout, target: Path | None, groups: Groups) -> dict[str, Any]:
    shape = read_meta(checkpoint).model_shape()
    chunks, config = build_chunks(shape, layout.parallel, BUILD, max_sequence_length=tiny.SEQUENCE)
    dist_checkpoint.load_model(checkpoint, chunks)
    if target is not None:
        if dist.get_rank() == 0:
            target.mkdir(parents=True)
            write_meta(target, replace(read_meta(checkpoint), manifest=None))
        dist.barrier()
        dist_checkpoint.save(target, chunks, None)
    whole = tiny.batch(shape.vocab_size)
    batches = [Microbatch(**{k: v[i : i + 1] for k, v in whole.items()}) for i in range(tiny.SAMPLES)]
    logits = _logits(chunks, batches, groups)
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    gradients = _gradients(chunks, config, layout, batches, groups)
    dist.barrier()
    place = {"cp": groups.cp.rank(), "stage": groups.pp.rank(), "counts": groups.counts_loss}
    return {"logits": logits, "gradients": gradients, "parameters": held, **place}


@torch.no_grad()
def _logits(chunks: list[Any], batches: list[Any], groups: Groups) -> torch.Tensor | None:
    """This context-parallel rank's logits, [SAMPLES, s/cp, padded V]; None where there is no head."""
    seen: list[torch.Tensor] = []
    deal = groups.deal()

    def step(iterator: Any, model: Any) -> Any:
        tokens = next(iterator).tokens
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        out = model(deal.cut(tokens), deal.cut(positions), None)

        def keep(output: torch.Tensor) -> Any:
            seen.append(output)
            return output.sum(), torch.tensor(1, dtype=torch.int32), {}

        return out, keep

    run_schedule(step, batches, chunks, forward_only=True)
    if not seen:
        return None
    local = torch.cat(seen).contiguous()
    parts = [torch.empty_like(local) for _ in range(groups.tp.size())]
    dist.all_gather(parts, local, group=groups.tp)
    return torch.cat(parts, dim=-1)


def _gradients(chunks: list[Any], config: Any, layout: Layout, batches: list[Any], groups: Groups) -> list[Any]:
    """(name in a checkpoint, offset, axes that stand for the layer, values) of every shard on this rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    wrapped = optim.wrap_ddp(chunks, config, layout.parallel)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    run_schedule(make_forward_step(NTP(), groups=groups), batches, wrapped, forward_only=False)
    state = {}
    for i, chunk in enumerate(wrapped):
        for parameter in chunk.module.parameters():
            parameter.data = parameter.main_grad.clone()
        state[f"model{i}"] = unwrap(chunk).sharded_state_dict(metadata={})
    apply_factories(state)
    return [
        (leaf.key, leaf.global_shape, leaf.global_offset, leaf.prepend_axis_num, leaf.data.detach().numpy())
        for leaf in _leaves(state)
        if isinstance(leaf, ShardedTensor)
    ]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]
