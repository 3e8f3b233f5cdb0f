"""The package's own modules inside Megatron against plain definitions: attention, the loss hook, greedy decoding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remit_megatron.config import Parallel
from remit_megatron.mcore.groups import destroy_groups
from remit_megatron.mcore.platform import activate
from remit_megatron.ops import spec as specification
from tests.mcore.harness import BUILD, SEQUENCE, STUDENT, TIED, global_batches, save_initial
from tests.ranks import run_ranks


def plain_attention(q: Any, k: Any, v: Any, documents: Any, scale: float) -> torch.Tensor:
    """Softmax attention in float64, written out. q, k, v [s, b, heads, d] -> [s, b, heads * d_v]."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * scale
    position = torch.arange(len(q))
    visible = (position[:, None] >= position[None, :]).expand(q.shape[1], 1, -1, -1)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def attention_case(rank: int, size: int) -> list[float]:
    """Largest errors of output and gradients, over head ratios, widths and masks."""
    activate("cpu")
    from remit_megatron.mcore.attention import SDPAttention
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.ops.context_parallel import zigzag_slice

    groups = initialize_groups(Parallel(context=size), seed=1)
    errors = []
    for heads, kv, width, value_width, masked in [(4, 4, 8, 8, False), (4, 2, 8, 8, True), (6, 1, 10, 6, False)]:
        g = torch.Generator().manual_seed(heads)
        shapes = ((16, 2, heads, width), (16, 2, kv, width), (16, 2, kv, value_width))
        q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
        upstream = torch.randn(16, 2, heads * value_width, generator=g)
        documents = torch.randint(0, 3, (2, 16), generator=g).sort(1).values if masked else None
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        want = plain_attention(*exact, documents, width**-0.5)
        want.backward(upstream.double())

        module = SDPAttention(SimpleNamespace(attention_dropout=0.0), 1, pg_collection=SimpleNamespace(cp=groups.cp))
        mine = [zigzag_slice(x, rank, size, dim=0).clone().requires_grad_() for x in (q, k, v)]
        got = module(*mine, documents)
        got.backward(zigzag_slice(upstream, rank, size, dim=0))
        pairs = [(got, want), *((a.grad, b.grad) for a, b in zip(mine, exact, strict=True))]
        errors += [(a - zigzag_slice(b, rank, size, dim=0)).abs().max().item() for a, b in pairs]
    destroy_groups()
    return errors


@pytest.mark.parametrize("size", [1, 2])
def test_attention(size: int) -> None:
    """float32 against float64 at values of order 1: round-off of a few sums of 16 terms."""
    for errors in run_ranks(size, attention_case, size):
        assert max(errors) < 5e-6, errors


def decode_case(rank: int, folder: str) -> dict[str, Any]:
    """Greedy continuations and the specification's NLL, from the model's own full logits."""
    activate("cpu")
    from remit_megatron.mcore import dist_checkpoint
    from remit_megatron.mcore.generate import greedy
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks

    prompts = [[5, 6, 7], [9], [30, 2, 2, 2, 8, 1, 4], [60, 59]]
    found: dict[str, Any] = {}
    layouts = {"tp": Parallel(tensor=2), "tp+sp": Parallel(tensor=2, sequence=True), "dp": Parallel()}
    for name, parallel in layouts.items():
        groups = initialize_groups(parallel, seed=1)
        (scorer,), _ = build_chunks(TIED, parallel, BUILD, max_sequence_length=32, scorer=True)
        dist_checkpoint.load_model(Path(folder) / "tied", [scorer])
        found[name] = greedy(scorer, prompts, max_new_tokens=9, eod_id=0, groups=groups, batch_size=3)
        destroy_groups()

    initialize_groups(Parallel(), seed=1)
    (model,), _ = build_chunks(TIED, Parallel(), BUILD, max_sequence_length=32)
    dist_checkpoint.load_model(Path(folder) / "tied", [model])
    model.eval()
    found["plain"] = [_continue(model, prompt, 9) for prompt in prompts]

    batch = global_batches()[0]
    with torch.no_grad():
        positions = torch.arange(SEQUENCE).expand_as(batch.tokens)
        logits = model(batch.tokens, positions, None)
        nll = model(batch.tokens, positions, None, labels=batch.labels)
    want = specification.token_nll(logits.flatten(0, 1), batch.labels.flatten(), valid_vocab=STUDENT.vocab_size)
    found["nll error"] = (nll.flatten() - want).abs().max().item()
    destroy_groups()
    return found


@torch.no_grad()
def _continue(model: Any, prompt: list[int], limit: int) -> list[int]:
    text = list(prompt)
    for _ in range(limit):
        tokens = torch.tensor([text])
        token = int(model(tokens, torch.arange(len(text))[None], None)[0, -1, :61].argmax())
        if token == 0:
            break
        text.append(token)
    return text[len(prompt) :]


def _save(rank: int, folder: str) -> None:
    activate("cpu")
    save_initial(Path(folder), {"tied": TIED})


def test_greedy_decoding_and_the_hook(tmp_path: Path) -> None:
    run_ranks(1, _save, str(tmp_path))
    results = run_ranks(2, decode_case, str(tmp_path))
    for found in results:
        assert any(found["plain"])
        for name in ("tp", "tp+sp", "dp"):
            assert found[name] == found["plain"], name
        assert found["nll error"] < 2e-6 * 10, "float32 logits of magnitude up to 10 against float64"
