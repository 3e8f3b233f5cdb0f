"""Peak memory of the torch implementation, as torch's own CPU allocator reports it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from remit_megatron.ops.linear_nll import linear_nll
from remit_megatron.ops.token_nll import token_nll

TOKENS, VOCAB = 4096, 32_768
"""268 MB in 16 bits: smaller logits meet the floor of the working copy, 1 MiB."""


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at one time beyond what was there before; temporaries inside operators count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def test_the_measurement_sees_what_is_there() -> None:
    x = torch.zeros(1 << 20)
    assert peak_bytes(lambda: (x + 1).sum()) == pytest.approx(4 << 20, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extra_memory_is_one_percent_of_the_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(VOCAB, generator=generator, dtype=dtype).requires_grad_()
    logits = leaf * torch.linspace(0.5, 2.0, TOKENS, dtype=dtype)[:, None]
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.rand(TOKENS, generator=generator)
    allowed = 0.01 * logits.numel() * logits.element_size()
    kept = {}

    def forward() -> None:
        kept["nll"] = token_nll(logits, labels, valid_vocab=VOCAB - 100)

    assert peak_bytes(forward) <= allowed
    assert peak_bytes(lambda: torch.autograd.grad(kept["nll"], logits, upstream)) <= allowed


def test_the_head_holds_one_chunk_of_logits() -> None:
    tokens, vocab, chunk_tokens = 1024, 16_384, 256
    hidden, weight = torch.randn(tokens, 16), torch.randn(vocab, 16)
    labels = torch.zeros(tokens, dtype=torch.int64)
    chunk_bytes = chunk_tokens * vocab * 4
    peak = peak_bytes(lambda: linear_nll(hidden, weight, labels, chunk_tokens=chunk_tokens))
    assert chunk_bytes <= peak <= chunk_bytes + (5 << 18)  # and the working copy of 1 MiB
