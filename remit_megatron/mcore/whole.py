"""A model whole on one CPU process, for conversion and for comparison with another implementation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore import platform
from remit_megatron.mcore.checkpoint_read import Reader
from remit_megatron.mcore.groups import destroy_groups, initialize_groups
from remit_megatron.mcore.loss_hook import unwrap
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.shape import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"


@contextlib.contextmanager
def whole_model(shape: ModelShape, dtype: torch.dtype, max_sequence_length: int = 4096) -> Iterator[Any]:
    """The model with unset weights, on the CPU, in a process group of one that exists for the length of the block.

    The process must not have chosen another device. The model maps tokens [1, s] to logits [1, s, V].
    """
    platform.activate("cpu")
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    assert dist.get_world_size() == 1
    try:
        initialize_groups(Parallel(), seed=0)
        build = Build(device=platform.CPU, dtype=dtype, initialize=False, loss_implementation="torch")
        chunks, _ = build_chunks(shape, Parallel(), build, max_sequence_length=max_sequence_length)
        model = unwrap(chunks[0])
        model.eval().requires_grad_(False)
        yield model
    finally:
        destroy_groups()
        if alone:
            dist.destroy_process_group()


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The type of the weights of a checkpoint. Raises UserError when it cannot be read."""
    try:
        metadata = Reader(checkpoint).read_metadata().state_dict_metadata
        embedding: Any = metadata[EMBEDDING]
        dtype: torch.dtype = embedding.properties.dtype
        return dtype
    except (OSError, KeyError, EOFError, AttributeError) as error:
        raise UserError(f"checkpoint {checkpoint}: its description cannot be read: {error!r}") from None
