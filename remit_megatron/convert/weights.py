"""Between the parameters of a whole model and the tensors of a Hugging Face folder, strictly one to one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from remit_megatron.errors import UserError
from remit_megatron.hf import layout
from remit_megatron.hf.families import tensor_names
from remit_megatron.hf.folder import HFFolder
from remit_megatron.shape import ModelShape

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Hugging Face tensor lives in the model."""

    part: torch.Tensor
    """A view of a parameter."""
    ndim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return layout.part_shape(self.part, self.ndim)


def places(model: Any, shape: ModelShape) -> dict[str, Place]:
    """Every Hugging Face tensor of a model, in the model's order, and its place. model: whole, on one process."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found: dict[str, Place] = {}
    for ours, theirs in tensor_names(shape).items():
        parameter = parameters.pop(ours)
        parts: tuple[torch.Tensor, ...] = (parameter,)
        if ".linear_qkv." in ours:
            parts = layout.qkv_parts(parameter, shape.num_query_groups, shape.kv_channels)
        elif ".linear_fc1." in ours:
            parts = layout.gate_up_parts(parameter)
        for name, part in zip(theirs, parts, strict=True):
            found[name] = Place(part, parameter.ndim)
    assert not parameters, f"the name table leaves out {sorted(parameters)}"
    return found


def check_tensors(folder: HFFolder, wanted: dict[str, Place], shape: ModelShape) -> None:
    """Raise UserError unless the folder holds exactly the wanted tensors, in the wanted shapes.

    A tied head that is stored all the same must equal the embedding.
    """
    names = set(folder.tensors)
    if shape.tied_embeddings and HEAD in names and EMBEDDING in names:
        if not folder.equal(HEAD, EMBEDDING):
            raise UserError(
                f"{folder.path}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}: set "
                "tie_word_embeddings = false if the model was trained with a head of its own"
            )
        names.remove(HEAD)
    missing, unexpected = wanted.keys() - names, names - wanted.keys()
    if missing == {HEAD}:
        raise UserError(f"{folder.path}: {HEAD} is missing, and config.json does not tie the embeddings")
    if missing or unexpected:
        raise UserError(
            f"{folder.path}: {len(missing)} tensors are missing ({_some(missing)}) and {len(unexpected)} are unknown "
            f"({_some(unexpected)})"
        )
    for name in sorted(names):
        if folder.tensors[name].shape != wanted[name].shape:
            raise UserError(
                f"{folder.path}: {name} is {list(folder.tensors[name].shape)}, config.json asks for "
                f"{list(wanted[name].shape)}"
            )


def fill(wanted: dict[str, Place], folder: HFFolder) -> Iterator[int]:
    """Copy every tensor of a checked folder into its place; yields the bytes read so far."""
    left = set(wanted)
    done = 0
    for name, tensor in folder:
        if name in wanted:
            layout.write_part(wanted[name].part, tensor)
            left.remove(name)
        done += tensor.nbytes
        yield done
    assert not left, f"never written: {sorted(left)}"


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "") if shown else "none"
