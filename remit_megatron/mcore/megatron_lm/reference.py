"""The frozen reference inside Megatron-LM's script: built by its gpt_builder in the student's layout, and loaded."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import Float16Module
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.global_vars import set_args

from remit_megatron.errors import UserError
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.loss_hook import hooked
from remit_megatron.mcore.megatron_lm.checkpoint import FLAG, read_arguments, resolve
from remit_megatron.mcore.megatron_lm.shapes import SHAPE_ARGUMENTS

Builder = Callable[..., Any]
"""Megatron-LM's `gpt_builder`, or one of its form: (args, pre_process, post_process, vp_stage, config)."""
OF_THE_STUDENT = {
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "use_checkpoint_args": False,
}
"""Arguments about the student's own depth and memory, and what the reference has in their place."""


def load_reference(build: Builder, path: str, valid_vocab: int) -> list[Any]:
    """This rank's frozen chunks, with the weights of a checkpoint; collective.

    path: a checkpoint of Megatron-LM or of this package, or a folder of them, whose newest is taken. Raises UserError
    naming --remit-reference for one that cannot be loaded.
    """
    own, folder = get_args(), resolve(Path(path), FLAG)
    found = read_arguments(folder)
    arguments = copy.copy(own)
    for name, value in OF_THE_STUDENT.items():
        setattr(arguments, name, value)
    for name in SHAPE_ARGUMENTS:
        if name in found:
            setattr(arguments, name, found[name])
    # Only padding may differ, and a checkpoint is loaded into any; the student's divides by this layout.
    arguments.padded_vocab_size = own.padded_vocab_size
    if found["padded_vocab_size"] < valid_vocab:
        raise UserError(
            f"{FLAG} {path}: it has {found['padded_vocab_size']} rows of the vocabulary, the student {valid_vocab}"
        )
    with _in_place_of_own(arguments):
        chunks = _build(build, arguments, valid_vocab)
    dist_checkpoint.load_model(folder, chunks)
    print_rank_0(f"remit: reference {folder}, {arguments.num_layers} layers of width {arguments.hidden_size}")
    return chunks


def _build(build: Builder, arguments: Any, valid_vocab: int) -> list[Any]:
    config = core_transformer_config_from_args(arguments)  # its own: p2p shapes and sync hooks live on it
    config.perform_initialization = False  # nor is the student's random state moved
    stages = arguments.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for number in range(stages):
        stage = {} if stages == 1 else {"vp_stage": number}
        model = build(
            arguments,
            mpu.is_pipeline_first_stage(ignore_virtual=False, **stage),
            mpu.is_pipeline_last_stage(ignore_virtual=False, **stage),
            config=config,
            **stage,
        )
        model.cuda(torch.cuda.current_device())
        chunk: Any = hooked(model, valid_vocab=valid_vocab, scorer=True)
        if arguments.bf16 or arguments.fp16:
            chunk = Float16Module(config, chunk)
        chunks.append(chunk.eval().requires_grad_(False))
    return chunks


@contextlib.contextmanager
def _in_place_of_own(arguments: Any) -> Iterator[None]:
    """Builders look at the global arguments, too."""
    own = get_args()
    set_args(arguments)
    try:
        yield
    finally:
        set_args(own)
