"""The process groups of a run, read from Megatron's global state once and passed on as one value."""

import gc
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from remit_megatron.config import Parallel
from remit_megatron.data.deal import Deal
from remit_megatron.fit import data_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups and this rank's place in them."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    """Data- and context-parallel ranks: over them loss sums and token counts add up to the global batch's."""
    rank: int
    world_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss (with interleaving: its last chunk does)."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def counts_loss(self) -> bool:
        """True on one rank per slice of the batch: last stage, first tensor-parallel rank."""
        return self.is_last_stage and self.tp.rank() == 0

    def deal(self, microbatch_samples: int = 1) -> Deal:
        """This rank's place among those that share a batch, in microbatches of so many samples."""
        return Deal(
            dp_rank=self.dp.rank(),
            dp_size=self.dp.size(),
            cp_rank=self.cp.rank(),
            cp_size=self.cp.size(),
            microbatch_samples=microbatch_samples,
        )


def initialize_groups(parallel: Parallel, seed: int, timeout_s: float = 1800) -> Groups:
    """Build Megatron's groups and random states. torch.distributed must be initialised.

    timeout_s: of the groups' collectives; Megatron's groups do not take over the world's.
    """
    data_parallel_size(parallel, dist.get_world_size())
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_s / 60,
    )
    model_parallel_cuda_manual_seed(seed)
    return current_groups()


def current_groups() -> Groups:
    """The groups that Megatron's global state holds; for scripts that initialised it themselves."""
    return Groups(
        tp=mpu.get_tensor_model_parallel_group(),
        pp=mpu.get_pipeline_model_parallel_group(),
        cp=mpu.get_context_parallel_group(),
        dp=mpu.get_data_parallel_group(),
        dp_cp=mpu.get_data_parallel_group(with_context_parallel=True),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def destroy_groups() -> None:
    """Leave the layout: end every group but the world's. Collective. Models built in it must no longer be used.

    Megatron's own function only forgets its groups. Each gloo group keeps threads that wake a hundred times a second,
    so that a process that changes its layout often would end up doing nothing else.
    """
    mpu.destroy_model_parallel()
    mpu._global_process_group_list = None
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
