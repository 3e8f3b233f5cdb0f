"""Greedy decoding in ragged batches and under tensor parallelism picks what one unpadded row at a time picks."""

from pathlib import Path
from typing import Any

import torch

from remit_megatron.config import Parallel
from remit_megatron.mcore import dist_checkpoint
from remit_megatron.mcore.generate import greedy
from remit_megatron.mcore.groups import destroy_groups, initialize_groups
from remit_megatron.mcore.model import build_chunks
from remit_megatron.mcore.platform import activate
from tests.mcore.harness import BUILD, SEQUENCE, STUDENT, randomise
from tests.ranks import run_ranks

PROMPTS = [[5, 9, 3, 17], [2], [44, 1, 60, 7, 7, 12, 30], [8, 8], [21, 50, 3, 4, 5, 6, 7, 8]]
NEW_TOKENS = 8


def one_by_one(model: Any, prompt: list[int], eod_id: int | None) -> list[int]:
    """The definition: the whole unpadded row through a model with ordinary logits, for each token."""
    row = list(prompt)
    while len(row) < len(prompt) + NEW_TOKENS:
        logits = model(torch.tensor([row]), torch.arange(len(row))[None], None)
        chosen = int(logits[0, -1, : STUDENT.vocab_size].double().argmax())
        if chosen == eod_id:
            break
        row.append(chosen)
    return row[len(prompt) :]


def _on_rank(rank: int, folder: str) -> dict[str, Any]:
    activate("cpu")
    initialize_groups(Parallel(), seed=1)
    chunks, _ = build_chunks(STUDENT, Parallel(), BUILD, max_sequence_length=SEQUENCE)
    randomise(chunks)
    dist_checkpoint.save(Path(folder), chunks, None)
    with torch.no_grad():
        endless = [one_by_one(chunks[0], prompt, None) for prompt in PROMPTS]
        eod_id = endless[0][2]
        expected = [one_by_one(chunks[0], prompt, eod_id) for prompt in PROMPTS]
    destroy_groups()

    found = {}
    for name, parallel in {
        "DP2": Parallel(),
        "TP2": Parallel(tensor=2),
        "TP2+SP": Parallel(tensor=2, sequence=True),
    }.items():
        groups = initialize_groups(parallel, seed=1)
        scorer, _ = build_chunks(STUDENT, parallel, BUILD, max_sequence_length=SEQUENCE, scorer=True)
        dist_checkpoint.load_model(Path(folder), scorer)
        for rows in (1, 3, 64):
            found[f"{name} {rows}"] = greedy(
                scorer[0], PROMPTS, max_new_tokens=NEW_TOKENS, eod_id=eod_id, groups=groups, batch_size=rows
            )
        head = scorer[0].output_layer.weight.data
        if parallel.tensor == 2 and rank == 1:
            head[-1] = 50 * head[0]  # the padded row: where the logit of head[0] is positive, it would win
        padded = greedy(scorer[0], PROMPTS, max_new_tokens=NEW_TOKENS, eod_id=eod_id, groups=groups)
        assert padded == found[f"{name} 64"]
        destroy_groups()
    return {"endless": endless, "eod_id": eod_id, "expected": expected, "found": found}


def test_greedy(tmp_path: Path) -> None:
    for result in run_ranks(2, _on_rank, str(tmp_path)):
        for name, rows in result["found"].items():
            assert rows == result["expected"], name
        # The case is worth something: rows differ, and one ends early while another does not.
        assert {len(row) for row in result["expected"]} > {NEW_TOKENS}
        assert len({tuple(row) for row in result["endless"]}) == len(PROMPTS)
