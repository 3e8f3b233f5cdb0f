"""Between the parameters of a whole model and the tensors of a Hugging Face folder, strictly one to one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from remit_megatron.errors import UserError
from remit_megatron.hf import layout
from remit_megatron.hf.folder import HFFolder
from remit_megatron.hf.mapping import tensor_names
from remit_megatron.shape import ModelShape


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


def fill(wanted: dict[str, Place], folder: HFFolder) -> Iterator[int]:
    """Copy every tensor of a checked folder into its place; yields the bytes read so far.

    Raises UserError at a number that is not finite: no training recovers from one, and few programs say so.
    """
    left = set(wanted)
    done = 0
    for name, tensor in folder:
        if name in wanted:
            check_finite(folder, name, tensor)
            layout.write_part(wanted[name].part, tensor)
            left.remove(name)
        done += tensor.nbytes
        yield done
    assert not left, f"never written: {sorted(left)}"


def check_finite(folder: HFFolder, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError naming the tensor and its first number that is not finite."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        value = float(tensor[tuple(where)])
        raise UserError(
            f"{folder.path}: {name} has {int((~finite).sum()):,} numbers that are not finite, the first is {value} at "
            f"{where}: the file is broken, or the model is: get it again, or an earlier checkpoint"
        )
