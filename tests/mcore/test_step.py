"""What the forward step refuses: configurations that Megatron accepts and computes wrongly, or that it cannot serve."""

from typing import Any

import pytest
import torch

from remit_megatron.config import Parallel
from remit_megatron.errors import UserError
from remit_megatron.mcore.groups import destroy_groups
from remit_megatron.mcore.platform import activate
from remit_megatron.objectives import NTP, Remit, Rho1
from tests.mcore.harness import BUILD, STUDENT
from tests.mcore.refusals import messages_of
from tests.ranks import run_ranks


def refusals(rank: int) -> dict[str, str]:
    """Each case's message."""
    activate("cpu")
    import dataclasses

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from remit_megatron.mcore.families import layer_spec
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.loss_hook import RemitGPTModel
    from remit_megatron.mcore.model import make_config
    from remit_megatron.mcore.step import make_forward_step

    initialize_groups(Parallel(), seed=1)
    text = torch.randint(61, (2, 17))
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(2, 16)}
    documents, plain = torch.arange(16).div(6).floor().long().expand(2, 16), get_gpt_layer_local_spec()
    good = make_config(STUDENT, Parallel(), BUILD)

    def build(cls: Any, spec: Any = None, **changes: Any) -> Any:
        spec = spec or layer_spec(STUDENT, "local")
        return cls(dataclasses.replace(good, **changes), spec, 61, 16, position_embedding_type="rope")

    def build_newer(**keys: Any) -> None:
        """With keys that the config of a newer Megatron-Core has, whether or not this one's has them."""
        config = dataclasses.replace(good)
        for key, value in keys.items():
            setattr(config, key, value)
        RemitGPTModel(config, layer_spec(STUDENT, "local"), 61, 16, position_embedding_type="rope")

    def forward_step(step: Any, model: Any, batch: dict[str, Any]) -> None:
        """As a script of one's own calls it, with plain dicts."""
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=16,
            micro_batch_size=2,
            forward_only=True,
        )

    def step(model: Any, objective: Any, **more: torch.Tensor) -> None:
        forward_step(make_forward_step(objective), model, {**batch, **more})

    cases = {
        "gtp": lambda: build_newer(gtp_weight_remat_size=2),
        "expert gtp": lambda: build_newer(expert_gtp_weight_remat_size=4),
        "logits": lambda: build_newer(logit_dtype=torch.float32),
        "mean": lambda: step(build(RemitGPTModel, calculate_per_token_loss=False), NTP()),
        "plain model": lambda: step(build(GPTModel), NTP()),
        "no reference": lambda: step(build(RemitGPTModel), Remit()),
        "attention mask": lambda: step(build(RemitGPTModel), NTP(), attention_mask=torch.ones(2, 1, 16, 16)),
        "positions": lambda: step(
            build(RemitGPTModel), NTP(), position_ids=torch.arange(16).remainder(9).expand(2, 16)
        ),
        "own positions": lambda: step(build(RemitGPTModel), NTP(), position_ids=torch.arange(16).expand(2, 16)),
        "documents": lambda: step(build(RemitGPTModel), NTP(), documents=documents),
        "unread documents": lambda: step(build(RemitGPTModel, spec=plain), NTP(), documents=documents),
        "no labels": lambda: forward_step(make_forward_step(NTP()), build(RemitGPTModel), {"tokens": text[:, :-1]}),
        "a part": lambda: forward_step(make_forward_step(NTP(), sequence_length=32), build(RemitGPTModel), batch),
        "no selection": lambda: step(build(RemitGPTModel), Rho1(scope="global"), ref_nll=torch.ones(2, 16)),
    }
    found = messages_of(cases)
    destroy_groups()
    return found


EXPECTED = {
    "gtp": "gtp_weight_remat_size = 2 is not supported",
    "expert gtp": "expert_gtp_weight_remat_size = 4 is not supported",
    "logits": "logit_dtype is not supported",
    "mean": "calculate_per_token_loss must be True",
    "plain model": "must be a remit_megatron.mcore.RemitGPTModel, got GPTModel",
    "no reference": "objective 'remit' needs ref_nll",
    "attention mask": "the batch's 'attention_mask' is not read: attention is causal",
    "positions": "'position_ids' are not 0..s-1, and position_embedding_type = 'rope' does not read them",
    "own positions": "accepted",
    "documents": "accepted",
    "unread documents": "the batch has `documents`, which the layers' core attention DotProductAttention does not read",
    "no labels": "the batch has no 'labels'",
    "a part": "the batch has 16 positions, and whole samples have sequence_length = 32",
    "no selection": "with scope = 'global' call forward_step.prepare(...)",
}


def test_refusals_name_the_cause() -> None:
    (found,) = run_ranks(1, refusals)
    for name, message in EXPECTED.items():
        assert message in found[name], f"{name}: {found[name]}"


def two_stages(rank: int) -> list[str]:
    activate("cpu")
    import dataclasses

    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.step import make_forward_step

    parallel = Parallel(pipeline=2, virtual_pipeline=2)
    groups = initialize_groups(parallel, seed=1)
    chunks, config = build_chunks(STUDENT, parallel, BUILD, max_sequence_length=16)
    step = make_forward_step(NTP(), groups=groups)
    wrong = dataclasses.replace(config, overlap_p2p_comm=False, batch_p2p_comm=True)
    messages = []
    for chunk in chunks:
        chunk.config = wrong
        with pytest.raises(UserError) as caught:
            step(iter([{"tokens": torch.zeros(1, 16, dtype=torch.int64)}]), chunk)
        messages.append(str(caught.value))
    destroy_groups()
    return messages


def test_two_interleaved_stages_over_batched_p2p() -> None:
    for messages in run_ranks(2, two_stages):
        assert all("overlap_p2p_comm=True and batch_p2p_comm=False" in message for message in messages)
