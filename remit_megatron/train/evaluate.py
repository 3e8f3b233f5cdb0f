"""What a model is worth: held-out NLL in any layout, and exact-match accuracy on problems with a known answer."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.config import Recipe
from remit_megatron.data.files import writing
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.mcore import datasets, dist_checkpoint
from remit_megatron.mcore.generate import greedy
from remit_megatron.mcore.groups import Groups, initialize_groups
from remit_megatron.mcore.model import Build, build_chunks
from remit_megatron.mcore.step import make_forward_step, run_schedule
from remit_megatron.objectives import NTP
from remit_megatron.shape import check_layout
from remit_megatron.train.checkpoint import read_meta, resolve_checkpoint
from remit_megatron.train.dealt import DealtSamples
from remit_megatron.train.metrics import read, reduce_reports
from remit_megatron.train.models import check_document_mask, training_dtype
from remit_megatron.train.runtime import Process, joined_process


class Evaluator:
    """Mean NLL in nats over the first samples of each held-out set, whatever the layout."""

    def __init__(self, recipe: Recipe, groups: Groups, vocab_size: int, tokenizer_hash: str | None):
        self.recipe = recipe
        self.groups = groups
        self.sets = {
            name: datasets.HeldOut(
                datasets.open_source(path, recipe.data, vocab_size, tokenizer_hash),
                recipe.data,
                recipe.evaluation.samples,
            )
            for name, path in recipe.data.eval.items()
        }

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document in the held-out sets; None where there is no set, or it names none."""
        return next((held_out.eod_id for held_out in self.sets.values()), None)

    @torch.no_grad()
    def run(self, chunks: list[Any], device: torch.device) -> dict[str, float]:
        """`eval/<name>/nll` of each set. Collective."""
        for chunk in chunks:
            chunk.eval()
        results = {}
        for name, held_out in self.sets.items():
            nll = self._nll(held_out, chunks, device)
            if nll is not None:
                results[f"eval/{name}/nll"] = nll
        for chunk in chunks:
            chunk.train()
        return results

    def _nll(self, held_out: datasets.HeldOut, chunks: list[Any], device: torch.device) -> float | None:
        """None where the mask keeps no token."""
        dealt = DealtSamples(self.recipe, held_out, self.groups, device)
        batches = dealt.microbatches(0, dealt.count)
        step = make_forward_step(NTP(), groups=self.groups)
        reports = run_schedule(step, batches, chunks, forward_only=True)
        ratios, _ = reduce_reports(reports, self.groups.counts_loss, [], device)
        return read(ratios).get("nll")


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
    meta = read_meta(path)
    shape = meta.model_shape()
    check_layout(shape, recipe.parallel, "model")
    groups = initialize_groups(recipe.parallel, recipe.seed, recipe.compute.collective_timeout_s)
    evaluator = Evaluator(recipe, groups, shape.vocab_size, meta.tokenizer)
    build = Build(
        device=process.device,
        dtype=training_dtype(recipe, process.device.type),
        implementation=recipe.model.implementation,
        loss_implementation=recipe.compute.loss_implementation,
    )
    chunks, _ = build_chunks(
        shape, recipe.parallel, build, max_sequence_length=recipe.data.sequence_length, scorer=True
    )
    dist_checkpoint.load_model(path, chunks)
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
