"""Megatron-Core's HybridModel as this package's models: attention and MLP are layers of their own, 2i and 2i + 1.

Its maintainers have deprecated GPTModel for it. The arithmetic is the same, and so are the checkpoints: what is
written under one class is read under the other, in any layout. Needs Megatron-Core 0.19 or newer.
"""

from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import sharded_state_dict_default

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore.families import layer_spec
from remit_megatron.mcore.loss_hook import LossHook
from remit_megatron.mcore.norm import RMSNorm
from remit_megatron.shape import ModelShape

ATTENTION, MLP, STAGE = "*", "-", "|"
"""Symbols of a layer pattern; the last stands between pipeline stages."""


class RemitHybridModel(LossHook, HybridModel):
    """`HybridModel` whose loss is the NLL of each label; see `LossHook`."""

    hybrid_layer_pattern: str
    mtp_num_depths: int

    def __init__(self, *args: Any, **kwargs: Any):
        """Raises UserError where `config.num_layers` is not the pattern's: Megatron compares the two nowhere."""
        super().__init__(*args, **kwargs)
        if self.mtp_num_depths:
            raise UserError(
                "multi-token prediction (/ in hybrid_layer_pattern) is not supported: its heads share the loss hook"
            )
        found = sum(self.hybrid_layer_pattern.count(symbol) for symbol in (ATTENTION, MLP))
        if found != self.config.num_layers:
            raise UserError(
                f"num_layers = {self.config.num_layers}, and hybrid_layer_pattern = '{self.hybrid_layer_pattern}' has "
                f"{found} layers: the initial weights of output projections follow the former"
            )
        if not self.config.is_hybrid_model:
            raise UserError(
                "a HybridModel's config needs is_hybrid_model = True: without it a new model's output projections "
                "start smaller by the square root of 2"
            )

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """With the keys of a GPTModel, which keeps no extra state of its output layer."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


class BlockStack(HybridStack):
    """A HybridStack of pairs of an attention and an MLP, with the final norm and the checkpoint keys of a GPTModel.

    Megatron's own builds Transformer Engine's norm whatever the spec says, and names every layer of its own.
    """

    def __init__(self, config: Any, submodules: Any, *args: Any, final_norm: Any = RMSNorm, **kwargs: Any):
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.post_layer_norm = True

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = None, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Of layers 2i and 2i + 1 as slice i of GPTModel's stacked tensors [L, ...]."""
        assert not sharded_offsets
        state, blocks = dict[str, Any](), self.config.num_layers // 2
        for number, layer in enumerate(self.layers):
            own = f"{prefix}layers.{number}."
            of_layer = layer.sharded_state_dict(own, [(0, (layer.layer_number - 1) // 2, blocks)], metadata)
            replace_prefix_for_sharding(of_layer, own, f"{prefix}layers.")
            state |= of_layer
        if self.post_process:
            own = f"{prefix}final_norm."
            of_norm = sharded_state_dict_default(self.final_norm, own, (), metadata, tp_group=self.tp_group)
            replace_prefix_for_sharding(of_norm, own, f"{prefix}final_layernorm.")
            state |= of_norm
        return state


def layer_pattern(num_layers: int, parallel: Parallel) -> str:
    """So many pairs of attention and MLP, cut evenly into the layout's pipeline stages."""
    stages = parallel.pipeline * parallel.virtual_pipeline
    return STAGE.join([(ATTENTION + MLP) * (num_layers // stages)] * stages)


def stack_spec(shape: ModelShape, implementation: str) -> ModuleSpec:
    """The modules of `layer_spec`, in layers of their own."""
    block = layer_spec(shape, implementation).submodules
    keys = block.sharded_state_dict_keys_map
    attention = TransformerLayerSubmodules(
        input_layernorm=block.input_layernorm,
        self_attention=block.self_attention,
        self_attn_bda=block.self_attn_bda,
        sharded_state_dict_keys_map=keys,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=block.pre_mlp_layernorm,
        mlp=block.mlp,
        mlp_bda=block.mlp_bda,
        sharded_state_dict_keys_map=keys,
    )
    params = {}
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        params = {"final_norm": TENorm}
    return ModuleSpec(
        module=BlockStack,
        params=params,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def build(
    shape: ModelShape,
    parallel: Parallel,
    implementation: str,
    config: TransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    settings: dict[str, Any],
) -> RemitHybridModel:
    """One chunk; config: of a build with stack = 'hybrid'; settings: what a RemitGPTModel takes too.

    Raises UserError for a shape that HybridModel cannot hold.
    """
    if shape.rope_llama3_factor is not None:
        raise UserError("stack = 'hybrid': HybridModel does not take Llama 3's rope_scaling: use stack = 'gpt'")
    return RemitHybridModel(
        config,
        stack_spec(shape, implementation),
        vocab_size,
        max_sequence_length,
        hybrid_layer_pattern=layer_pattern(shape.num_layers, parallel),
        **settings,
    )
