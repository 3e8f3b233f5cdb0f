"""Other implementations of a token's NLL, brought to one signature, and the ceilings they are measured against."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.ops.token_nll import token_nll

NLL = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, V] with gradient, labels [n]) -> NLL [n]."""


def start_single_rank_groups(device: str) -> None:
    """Megatron's losses ask a process group; one rank is its own group."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def megatron_unfused(device: str) -> NLL:
    start_single_rank_groups(device)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return lambda logits, labels: vocab_parallel_cross_entropy(logits, labels)


def megatron_fused(device: str) -> NLL:
    start_single_rank_groups(device)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    # It takes [s, b, V] only.
    return lambda logits, labels: fused_vocab_parallel_cross_entropy(logits[:, None], labels[:, None], group)[:, 0]


def liger(device: str) -> NLL:
    if device != "cuda":
        raise UserError("its kernels need a CUDA device")
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    loss = LigerVocabParallelCrossEntropy()  # what its Megatron integration runs; it takes [s, b, V] only
    return lambda logits, labels: loss(logits[:, None], labels[:, None])[:, 0]


def liger_whole_vocabulary(device: str) -> NLL:
    if device != "cuda":
        raise UserError("its kernels need a CUDA device")
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: liger_cross_entropy(logits, labels, reduction="none")


def compiled_cross_entropy(device: str) -> NLL:
    compiled: NLL = torch.compile(lambda logits, labels: F.cross_entropy(logits.float(), labels, reduction="none"))
    return compiled


def ours(device: str) -> NLL:
    return lambda logits, labels: token_nll(logits, labels)


PROVIDERS: dict[str, Callable[[str], NLL]] = {
    "ours": ours,
    "megatron unfused": megatron_unfused,
    "megatron fused": megatron_fused,
    "liger": liger,
    "liger, whole vocabulary": liger_whole_vocabulary,
    "compiled cross_entropy": compiled_cross_entropy,
}


def reader(x: Tensor) -> Callable[[], object]:
    """A call that reads x once and writes next to nothing."""
    words = x.view(-1).view(torch.int32)
    if not x.is_cuda:
        return words.amax
    from benchmarks.loss_read_kernel import launch_read  # imports triton, which only a GPU needs

    return launch_read(words)
