"""What a model is worth: held-out NLL in any layout, and exact-match accuracy on problems with a known answer."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import writing
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.fit import check_document_mask
from remit_megatron.mcore.generate import greedy
from remit_megatron.mcore.groups import Groups
from remit_megatron.run.checkpoint import resolve_checkpoint
from remit_megatron.run.models import build_frozen
from remit_megatron.run.prepare import prepare
from remit_megatron.run.process import Process, joined_process
from remit_megatron.train.held_out import Evaluator


def evaluate_checkpoint(
    recipe: Recipe, checkpoint: str, problems: str | None, max_new_tokens: int, output: str | None
) -> None:
    """Evaluate a checkpoint on a recipe's held-out sets and, with `problems`, by greedy decoding. Called on every rank.

    problems: jsonl with `prompt` and `answer`. Prints the figures as JSON on rank 0, and writes them to `output`.
    Raises UserError for a checkpoint or a file that does not fit.
    """
    check_document_mask(recipe)
    cases = _read_problems(problems) if problems else None
    tokenizer = open_tokenizer(recipe) if problems else None
    if output and not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    if output and Path(output).is_dir():
        raise UserError(f"--output {output} is a folder: name a file in it")
    with joined_process(recipe.compute) as process:
        figures = _figures(recipe, checkpoint, process, tokenizer, cases, max_new_tokens)
        if process.rank == 0:
            text = json.dumps(figures, indent=1)
            print(text)
            if output:
                with writing(Path(output)):
                    Path(output).write_text(text + "\n")


def _figures(
    recipe: Recipe,
    checkpoint: str,
    process: Process,
    tokenizer: Any,
    cases: list[dict[str, str]] | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    path = resolve_checkpoint(checkpoint, "--checkpoint")
    ready = prepare(recipe, process, checkpoint=path)
    meta, groups = ready.plan.init_meta, ready.groups
    assert meta is not None
    evaluator = Evaluator(recipe, groups, ready.plan.shape.vocab_size, ready.tokenizer)
    chunks = build_frozen(recipe, ready.plan, process.device)
    figures: dict[str, Any] = {"checkpoint": str(path), "step": meta.step, "tokens": meta.tokens}
    figures.update(evaluator.run(chunks, process.device))
    if cases is not None:
        eod = evaluator.eod_id if recipe.data.eod_id is None else recipe.data.eod_id
        if eod is None:
            raise UserError("decoding needs data.eod_id, the token that ends a text: the held-out sets name none")
        figures.update(_exact_match(chunks[0], tokenizer, cases, max_new_tokens, eod, groups))
    dist.barrier()
    return figures


def _exact_match(
    model: Any, tokenizer: Any, cases: list[dict[str, str]], max_new_tokens: int, eod: int, groups: Groups
) -> dict[str, Any]:
    prompts = [tokenizer.encode(case["prompt"], add_special_tokens=False).ids for case in cases]
    generated = greedy(model, prompts, max_new_tokens=max_new_tokens, eod_id=eod, groups=groups)
    answers = [boxed_answer(tokenizer.decode(ids)) for ids in generated]
    correct = sum(answer == case["answer"] for answer, case in zip(answers, cases, strict=True))
    return {"exact_match": correct / len(cases), "correct": correct, "problems": len(cases)}


def boxed_answer(text: str) -> str | None:
    """What stands in the first \\boxed{...} of a solution, braces matched, ends stripped; None where there is none."""
    _, _, rest = text.partition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i].strip()
    return None


def open_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of data.tokenizer. Raises UserError where the recipe names none that can be read."""
    if recipe.data.tokenizer is None:
        raise UserError("decoding needs data.tokenizer: a tokenizer.json, or a folder with one")
    return load_tokenizer(recipe.data.tokenizer, "data.tokenizer")


def _read_problems(path: str) -> list[dict[str, str]]:
    try:
        cases = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--problems {path}: cannot be read: {error}") from None
    if not cases or not all(isinstance(c, dict) and {"prompt", "answer"} <= c.keys() for c in cases):
        raise UserError(f"--problems {path}: every line must be an object with `prompt` and `answer`")
    if not all(isinstance(c["prompt"], str) and c["prompt"] for c in cases):
        raise UserError(f"--problems {path}: a prompt is empty")
    return cases
