"""Mixture of experts and multi-token prediction under this package's loss, for models that a script builds.

NTP is compared with Megatron's own loss on Megatron's own model: gradients of every weight, the router's auxiliary loss
and the heads of multi-token prediction included. ReMiT is compared over layouts. Both to float32 round-off: sums run
in another order, and 2e-5 of a parameter's largest gradient is what the other parity tests allow.
"""

import re
import zlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import SEQUENCE, global_batches, local_microbatches
from tests.mcore.test_weighting import script_step
from tests.ranks import run_ranks

RTOL, VOCAB, EXPERTS = 2e-5, 64, 4
ONE = Parallel(distributed_optimizer=False)
KINDS = ("experts", "mtp")
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "experts": [{"expert": 2}, {"expert": 1}],
    "mtp": [{"tensor": 2}, {"context": 2}, {"expert": 1}],
}
"""On two ranks; what is not named goes to data parallelism."""


def built(kind: str, layout: dict[str, int], scorer: bool = False) -> Any:
    """Megatron's own GPTModel with experts or a head for the second token, plain MLPs, and weights by their names."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from remit_megatron.mcore.attention import SDPAttention

    extra: dict[str, Any] = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
    if kind == "experts":
        extra = {"num_moe_experts": EXPERTS, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}
        extra |= {"moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "allgather"}
        extra |= {"expert_model_parallel_size": layout.get("expert", 1)}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=24 if scorer else 32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        activation_func=F.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.get("tensor", 1),
        context_parallel_size=layout.get("context", 1),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        **extra,
    )
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SDPAttention
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if kind == "mtp" else None
    model = GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope", mtp_block_spec=mtp)
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(f"{whole_name(name, layout)} {scorer}".encode())
        size = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            size[parameter.partition_dim] *= layout.get("tensor", 1)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        whole = 0.12 * noise if parameter.ndim > 1 else 1 + 0.2 * noise
        parameter.data = part(whole, parameter, layout)
    return model


def whole_name(name: str, layout: dict[str, int]) -> str:
    """With an expert's number among all."""
    from megatron.core import parallel_state as mpu

    first = mpu.get_expert_model_parallel_rank() * (EXPERTS // layout.get("expert", 1))
    return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{first + int(found[1])}", name)


def part(whole: torch.Tensor, parameter: Any, layout: dict[str, int]) -> torch.Tensor:
    """This rank's slice of a weight, or of its gradient."""
    size = layout.get("tensor", 1)
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole.clone()
    return whole.chunk(size, parameter.partition_dim)[dist.get_rank() % size].clone()


def gradients(kind: str, layout: dict[str, int], objective: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """Of one step, by whole names. objective None: Megatron's own model and loss."""
    from remit_megatron.mcore import optim
    from remit_megatron.mcore.groups import current_groups
    from remit_megatron.mcore.loss_hook import hooked, unwrap
    from remit_megatron.mcore.passes import run_schedule
    from remit_megatron.mcore.step import make_forward_step
    from remit_megatron.objectives import build_objective

    groups = current_groups()
    model = built(kind, layout)
    batches = local_microbatches(global_batches()[0], groups.dp.rank(), groups.dp.size(), documents=False)
    step: Any = partial(script_step, groups.deal())
    if objective is not None:
        made = build_objective(objective)
        reference = hooked(built(kind, layout, scorer=True), scorer=True) if made.needs_reference else None
        step = make_forward_step(made, reference)
        hooked(model)
        batches = step.selected(step.scored(batches), [model])
    chunks = optim.wrap_ddp([model], model.config, ONE)
    chunks[0].zero_grad_buffer()
    run_schedule(step, batches, chunks, forward_only=False)
    inner = unwrap(chunks[0])
    if objective is not None:
        assert inner.loss_calls == len(batches) * (2 if kind == "mtp" else 1)
    return {whole_name(name, layout): parameter.main_grad.clone() for name, parameter in inner.named_parameters()}


def on_rank(rank: int, wanted: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """On one rank the gradients themselves; on two what differs from them."""
    activate("cpu")
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from remit_megatron.mcore.groups import destroy_groups

    found: dict[str, Any] = {"problems": []}
    for kind in KINDS:
        for layout in LAYOUTS[kind] if wanted else [{}]:
            mpu.initialize_model_parallel(
                tensor_model_parallel_size=layout.get("tensor", 1),
                context_parallel_size=layout.get("context", 1),
                expert_model_parallel_size=layout.get("expert", 1),
            )
            model_parallel_cuda_manual_seed(1)
            for name, objective in {"own": None, "ntp": {"name": "ntp"}, "remit": {"name": "remit"}}.items():
                if name == "own" and layout.get("context", 1) > 1:
                    continue
                got = gradients(kind, layout, objective)
                if not wanted:
                    found[f"{kind} {name}"] = got
                    continue
                same = wanted[f"{kind} {'ntp' if name == 'own' else name}"]
                by_name = {whole_name(n, layout): p for n, p in built(kind, layout).named_parameters()}
                parts = {key: part(same[key], parameter, layout) for key, parameter in by_name.items()}
                found["problems"] += [f"{kind} {layout} {name}: {one}" for one in differences(got, parts)]
            destroy_groups()
    return found


def differences(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    found = []
    for name, value in want.items():
        off = float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-9))
        if not off <= RTOL:
            found.append(f"gradient of {name} is off by {off:.1e} of its largest")
    return found


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    (found,) = run_ranks(1, on_rank, {})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ntp_is_megatrons_own_loss(one_rank: dict[str, Any], kind: str) -> None:
    assert not differences(one_rank[f"{kind} ntp"], one_rank[f"{kind} own"])
    assert differences(one_rank[f"{kind} remit"], one_rank[f"{kind} ntp"]), "weights change gradients"
    extra = {"experts": "mlp.router.weight", "mtp": "mtp.layers.0"}[kind]
    assert any(extra in name and value.abs().max() > 0 for name, value in one_rank[f"{kind} ntp"].items())


def test_remit_does_not_depend_on_the_layout(one_rank: dict[str, Any]) -> None:
    one_rank = {name: value for name, value in one_rank.items() if name != "problems"}
    for found in run_ranks(2, on_rank, one_rank):
        assert not found["problems"], "\n".join(found["problems"])


def refused(rank: int) -> None:
    activate("cpu")
    from megatron.core import parallel_state as mpu

    from remit_megatron.mcore.loss_hook import hooked

    mpu.initialize_model_parallel()
    with pytest.raises(UserError, match=r"multi-token prediction .* needs loss_head = 'logits'"):
        hooked(built("mtp", {}), loss_head="sequence_chunks")


def test_sequence_chunks_and_mtp_are_refused() -> None:
    run_ranks(1, refused)
