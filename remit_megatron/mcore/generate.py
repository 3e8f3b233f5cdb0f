"""Greedy decoding with a frozen model, for exact-match evaluation of small models between training runs.

Every new token is a whole forward pass over the text so far, and only the last position goes through the head. An
inference engine is the tool for anything larger: export the checkpoint and use one.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.mcore.groups import Groups
from remit_megatron.mcore.loss_hook import unwrap


@torch.no_grad()
def greedy(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eod_id: int,
    groups: Groups,
    batch_size: int = 64,
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and without `eod_id`.

    model: a RemitGPTModel built as a scorer, so that its logits exist for the wanted positions only. Data-parallel
    ranks share the prompts; every rank gets all results, in the order of `prompts`. Collective. Raises UserError under
    pipeline or context parallelism.
    """
    if groups.pp.size() > 1 or groups.cp.size() > 1:
        raise UserError("decoding needs parallel.pipeline = 1 and parallel.context = 1")
    rank, size = groups.dp.rank(), groups.dp.size()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[rank::size]
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = _decode(unwrap(model), [prompts[i] for i in batch], max_new_tokens, eod_id, groups)
        done.update(zip(batch, texts, strict=True))
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, done, group=groups.dp)
    everything = {i: text for part in gathered for i, text in part.items()}
    return [everything[i] for i in range(len(prompts))]


def _decode(model: Any, prompts: list[list[int]], max_new_tokens: int, eod_id: int, groups: Groups) -> list[list[int]]:
    device = model.device_of_weights()
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    # Right-padded: under causal attention what follows a position cannot change it.
    text = torch.full((len(prompts), int(lengths.max()) + max_new_tokens), eod_id, device=device)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.tensor(prompt, device=device)
    starts, rows = lengths.clone(), torch.arange(len(prompts), device=device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(max_new_tokens):
        live = rows[alive]
        token = _next_token(model, text[live, : int(lengths[live].max())], lengths[live], groups)
        text[live, lengths[live]] = token
        lengths[live] += 1
        alive[live] = token != eod_id
        if not alive.any():
            break
    return [[t for t in text[row, starts[row] : lengths[row]].tolist() if t != eod_id] for row in range(len(prompts))]


def _next_token(model: Any, text: Tensor, lengths: Tensor, groups: Groups) -> Tensor:
    """text [b, s], lengths [b] -> the most likely next token of each row [b]; ties go to the lower id."""
    tp = groups.tp.size()
    # Sequence parallelism cuts the text into equal parts.
    text = torch.nn.functional.pad(text, (0, -text.size(1) % tp))
    positions = torch.arange(text.size(1), device=text.device).expand_as(text)
    hidden = model(text, positions, None)  # [b, s, h]
    last = hidden[torch.arange(len(text), device=text.device), lengths - 1]
    logits = (last @ model.head_weight().t()).float()  # [b, V/tp]
    first = groups.tp.rank() * logits.size(1)
    column = first + torch.arange(logits.size(1), device=logits.device)
    logits = logits.masked_fill(column >= model.valid_vocab, -torch.inf)
    value, index = logits.max(dim=1)
    best = torch.stack([value.double(), (index + first).double()])
    gathered = [torch.empty_like(best) for _ in range(tp)]
    dist.all_gather(gathered, best, group=groups.tp)
    values, indices = torch.stack(gathered).unbind(dim=1)
    return indices.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0).long()
