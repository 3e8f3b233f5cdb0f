"""Megatron-LM's pretrain_gpt.py with ReMiT: all of its flags, and --remit-*. Run it with Megatron-LM on PYTHONPATH.

torchrun --nproc-per-node N pretrain_remit.py FLAGS_OF_PRETRAIN_GPT --remit-reference CHECKPOINT
"""

import gpt_builders
import pretrain_gpt
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args

from remit_megatron.mcore.megatron_lm import pretrain


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[object, ...]:
    """Train, validation and test sets, on every pipeline stage: the reference scores whole samples of each."""
    arguments = get_args()
    kind = pretrain_gpt.MockGPTDataset if arguments.mock_data else pretrain_gpt.GPTDataset
    config = pretrain_gpt.core_gpt_dataset_config_from_args(arguments)

    def is_built_here() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0

    return tuple(BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build())


if __name__ == "__main__":
    datasets.is_distributed = True  # type: ignore[attr-defined]
    pretrain.run(
        datasets,
        gpt_builders.gpt_builder,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        get_embedding_ranks=pretrain_gpt.get_embedding_ranks,
    )
