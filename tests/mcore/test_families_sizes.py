"""Full-size models on the meta device, and what `remit plan` estimates against what a model keeps and computes."""

from typing import Any

import pytest
import torch

from remit_megatron.config import Parallel
from remit_megatron.plan import layer_activation_bytes
from remit_megatron.presets import PRESETS
from remit_megatron.shape import ModelShape
from tests.ranks import run_ranks

PUBLISHED = {"olmo2_1b": 1.485e9, "smollm3_3b": 3_075_098_624, "youtu_2b": 1.96e9}
SMALL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "vocab_size": 97}
PLAIN = {"num_query_groups": 2, "kv_channels": 16, "tied_embeddings": False, "rope_theta": 1e4, "norm_epsilon": 1e-5}
LATENT = {"q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20}
SHAPES = {
    "pre": ModelShape(**SMALL, **PLAIN),
    "post": ModelShape(**SMALL, **PLAIN, norm_placement="post", qk_norm="full_width", family="olmo2"),
    "latent": ModelShape(**SMALL, **{**PLAIN, "num_query_groups": 4, "kv_channels": 20}, latent=LATENT, family="youtu"),
}
TOKENS = 48


def measure(rank: int) -> dict[str, Any]:
    """Parameters of the presets; of small models, bytes kept a layer and FLOP of a forward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from remit_megatron.mcore.platform import activate
    from remit_megatron.mcore.whole import whole_model

    activate("cpu")  # it enters a mode of torch for good, so before the device's
    results: dict[str, Any] = {}
    for name, shape in PRESETS.items():
        with torch.device("meta"), whole_model(shape, torch.bfloat16) as model:
            devices = {parameter.device.type for parameter in model.parameters()}
            results[name] = sum(p.numel() for p in model.parameters()), devices
    tokens = torch.arange(TOKENS)[None]
    for name, shape in SHAPES.items():
        kept = []
        for layers in (2, 4):
            with whole_model(shape.model_copy(update={"num_layers": layers}), torch.float32) as model:
                for parameter in model.parameters():
                    parameter.data.normal_(0, 0.1)
                kept.append(saved_bytes(model, tokens))
                if layers == 2:
                    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                        model(tokens, tokens, None)
                    results[f"{name} flops"] = counter.get_total_flops()
        results[f"{name} bytes"] = (kept[1] - kept[0]) / 2
    return results


def saved_bytes(model: Any, tokens: torch.Tensor) -> int:
    """Bytes of the distinct storages, parameters aside, that autograd keeps from one forward pass."""
    model.requires_grad_(True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, tokens, None)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run_ranks(1, measure)[0]


@pytest.mark.parametrize("name", list(PRESETS))
def test_full_size(name: str, measured: dict[str, Any]) -> None:
    """Built on the meta device, the published models have the published numbers of parameters, as printed."""
    parameters, devices = measured[name]
    assert devices == {"meta"}
    assert parameters == PRESETS[name].num_parameters()
    assert parameters == pytest.approx(PUBLISHED[name], abs=0 if name == "smollm3_3b" else 0.005e9)


@pytest.mark.parametrize("name", list(SHAPES))
def test_flops(name: str, measured: dict[str, Any]) -> None:
    """torch counts the multiplications of the forward pass; what is not one is no part of the estimate."""
    norms = 2 * sum(size for size in _vectors(SHAPES[name]))
    assert measured[f"{name} flops"] == SHAPES[name].flops_per_token(TOKENS) * TOKENS - norms * TOKENS


def _vectors(shape: ModelShape) -> list[int]:
    """Sizes of the norms, which flops_per_token counts with the weights."""
    h = shape.hidden_size
    layer = [h, h]
    if shape.qk_norm == "full_width":
        layer.append((shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels)
    if shape.latent:
        layer += [shape.latent.q_lora_rank, shape.latent.kv_lora_rank]
    return [h, *layer * shape.num_layers]


@pytest.mark.parametrize("name", list(SHAPES))
def test_activations(name: str, measured: dict[str, Any]) -> None:
    """An estimate: it leaves out rotary tables, and vectors of a number a token that kernels keep for themselves."""
    estimate = layer_activation_bytes(SHAPES[name], Parallel(), 4, fused=False) * TOKENS
    assert measured[f"{name} bytes"] == pytest.approx(estimate, rel=0.15)
