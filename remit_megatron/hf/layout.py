"""Where Megatron keeps the tensors of a Hugging Face layer: views, so that one function serves both directions.

Megatron fuses query, key and value, one KV group after the other (the group's queries, its key, its value), and the
gate above the up projection. Each function returns the parts of a fused tensor as views: writing a Hugging Face
tensor into its view imports it, reading the view exports it.
"""

from torch import Tensor


def qkv_parts(fused: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """fused [groups * (r + 2) * width, ...] -> queries [groups, r, width, ...], keys, values [groups, 1, width, ...].

    r: query heads of a KV group. width: of a head. `...` is the input width of a weight, nothing of a bias.
    """
    rows = fused.unflatten(0, (groups, -1, width))
    return rows[:, :-2], rows[:, -2:-1], rows[:, -1:]


def gate_up_parts(fused: Tensor) -> tuple[Tensor, Tensor]:
    """fused [2 * ffn, ...] -> gate [ffn, ...], up [ffn, ...]."""
    rows = fused.unflatten(0, (2, -1))
    return rows[0], rows[1]


def write_part(part: Tensor, tensor: Tensor) -> None:
    """Copy a Hugging Face tensor into its view, with a cast where the types differ."""
    part.copy_(tensor.reshape(part.shape))


def read_part(part: Tensor, ndim: int) -> Tensor:
    """The Hugging Face tensor of a view, contiguous, with the `ndim` axes of the fused tensor."""
    return part.reshape(part_shape(part, ndim)).contiguous()


def part_shape(part: Tensor, ndim: int) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor of a view: leading axes are merged until `ndim` are left."""
    return tuple(part.flatten(0, part.ndim - ndim).shape) if part.ndim > ndim else tuple(part.shape)
