"""Megatron-LM's `pretrain` with ReMiT, called as its version wants to be called."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.enums import ModelType

from remit_megatron.errors import RemitError, UserError
from remit_megatron.mcore.loss_hook import hooked
from remit_megatron.mcore.megatron_lm.checkpoint import FLAG
from remit_megatron.objectives import OBJECTIVES

REFUSED = {
    "reset_attention_mask": "give each document a sample of its own; attention goes over the whole sample here",
    "reset_position_ids": "rotary positions are relative, and do not read them",
    "sft": "its packed sequences are not read",
    "fim_data": "its samples are not read",
    "hybrid_context_parallel": "it cuts samples in another way",
    "dataloader_inter_document_masking": "its packed sequences are not read",
    "perform_rl_step": "it has a loss of its own",
    "logits_load_dir": "it is another distillation",
    "use_legacy_models": "they have no loss hook",
    "overlap_moe_expert_parallel_comm": "it calls the model in another way",
    "use_torch_fsdp2": "it was not tried",
    "use_megatron_fsdp": "it was not tried",
}
"""Flags of Megatron-LM under which the step would train something else than it says, and why."""


def add_arguments(parser: Any) -> Any:
    """The flags of this package, for `extra_args_provider`."""
    group = parser.add_argument_group("remit")
    group.add_argument("--remit-objective", default="remit", choices=sorted(OBJECTIVES), help="default: remit")
    group.add_argument(FLAG, metavar="CHECKPOINT", help="torch_dist checkpoint of the frozen model")
    group.add_argument("--remit-set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the objective")
    group.add_argument(
        "--remit-valid-vocab",
        type=int,
        metavar="ROWS",
        help="rows of the vocabulary in the softmax; default: the tokenizer's; Megatron-LM's own loss has padding too",
    )
    parser.set_defaults(calculate_per_token_loss=True, create_attention_mask_in_dataloader=False)
    return parser


def check_arguments(arguments: Any) -> None:
    """Raises UserError naming a flag of Megatron-LM that does not go with ReMiT."""
    for name, why in REFUSED.items():
        if getattr(arguments, name, False):
            raise UserError(f"--{name.replace('_', '-')} does not go with ReMiT: {why}")
    graphs = f"{getattr(arguments, 'cuda_graph_impl', '')} {getattr(arguments, 'cuda_graph_scope', '')}"
    if "full_iteration" in graphs:
        raise UserError("CUDA graphs of a full iteration do not go with ReMiT: the reference runs within it")
    if not arguments.calculate_per_token_loss:
        raise UserError("ReMiT needs --calculate-per-token-loss: the other normalisation is inexact")


def hook_chunks(chunks: list[Any]) -> list[Any]:
    """The student's chunks with this package's loss: a pre-wrap hook."""
    from megatron.training import get_args

    from remit_megatron.mcore.megatron_lm.steps import objective_of, valid_vocab

    arguments = get_args()
    check_arguments(arguments)
    objective_of(arguments)  # what is wrong with it is said before the weights are read
    return [hooked(chunk, valid_vocab=valid_vocab(arguments)) for chunk in chunks]


def run(
    datasets: Callable[..., Any],
    build: Callable[..., Any],
    *,
    args_defaults: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """Train with ReMiT in Megatron-LM's `pretrain`. Ends the process with the error's code where one is raised.

    datasets: as `pretrain` takes it, with datasets on the first tensor-parallel rank of every pipeline stage. build:
    Megatron-LM's `gpt_builder`. more: goes on to `pretrain`, as `get_embedding_ranks` does.
    """
    from megatron.training import training

    from remit_megatron.mcore.megatron_lm.steps import install

    install(build)
    try:
        call(training.pretrain, datasets, build, args_defaults=args_defaults or {}, **more)
    except RemitError as error:
        print(f"pretrain_remit: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def call(
    pretrain: Callable[..., Any],
    datasets: Callable[..., Any],
    build: Callable[..., Any],
    *,
    args_defaults: dict[str, Any],
    **more: Any,
) -> Any:
    """Call `pretrain` by the signature it has: that of 0.16 and 0.17, of 0.18, or of 0.19 and later.

    Raises UserError for one that is none of these.
    """
    names = list(inspect.signature(pretrain).parameters)
    if names[:4] == ["train_valid_test_dataset_provider", "model_provider", "model_type", "forward_step_func"]:
        return pretrain(
            datasets,
            functools.partial(_provide, build),
            ModelType.encoder_or_decoder,
            _not_called,
            args_defaults=args_defaults,
            extra_args_provider=add_arguments,
            **more,
        )
    if names[:2] == ["cfg_container", "train_valid_test_dataset_provider"]:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        arguments = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=args_defaults)
        if names[2:5] == ["model_provider", "model_type", "forward_step_func"]:
            config = pretrain_cfg_container_from_args(arguments)
            provider = functools.partial(_provide, build)
            return pretrain(config, datasets, provider, ModelType.encoder_or_decoder, _not_called, **more)
        if names[2:4] == ["model_type", "forward_step_func"]:
            from megatron.training.argument_utils import gpt_config_from_args

            model = gpt_config_from_args(arguments)
            model.pre_wrap_hooks.append(hook_chunks)
            config = pretrain_cfg_container_from_args(arguments, model)
            return pretrain(config, datasets, ModelType.encoder_or_decoder, _not_called, **more)
    raise UserError(
        f"megatron.training.pretrain takes {', '.join(names[:5])}, ...: it is of a version of Megatron-LM that this "
        "package does not know; 0.16 to 0.19 are known"
    )


def _provide(build: Callable[..., Any], pre_process: bool = True, post_process: bool = True, **more: Any) -> Any:
    """A model provider: Megatron-LM's GPTModel with this package's loss."""
    from megatron.training import get_args

    model = build(get_args(), pre_process, post_process, **more)
    return hook_chunks([model])[0]


def _not_called(*args: Any) -> Any:
    """In place of a forward step: `steps.install` brings its own."""
    raise AssertionError("Megatron-LM's training loop has not asked for its schedule by the name that is replaced")
