"""Several models on the same held-out tokens: each one's NLL, and its KL from the reference's distribution.

What Figures 2, 3, 6b, 10 and 11 of the paper are drawn from.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remit_megatron.analysis.comparison import Comparison, ModelTokens
from remit_megatron.config import Recipe
from remit_megatron.data.tokenizer import same_tokenizer
from remit_megatron.errors import UserError
from remit_megatron.fit import check_document_mask
from remit_megatron.mcore import datasets, dist_checkpoint, passes
from remit_megatron.mcore.groups import Groups, initialize_groups
from remit_megatron.mcore.model import HEAD_CHUNK_TOKENS, Build, build_chunks
from remit_megatron.objectives import Remit
from remit_megatron.ops.weights import remit_weights
from remit_megatron.run.build_plan import find_model
from remit_megatron.run.checkpoint import Meta
from remit_megatron.run.dealt import DealtSamples
from remit_megatron.run.fit import check_documents, recipe_tokenizer
from remit_megatron.run.hf_source import ensure_converted
from remit_megatron.run.models import training_dtype
from remit_megatron.run.process import Process, from_rank_0
from remit_megatron.run.reference import Reference
from remit_megatron.shape import check_layout

ROUNDS_AT_A_TIME = 4
"""So many microbatches a pipeline stage have their hidden states of the reference held at once."""


def compare_models(
    recipe: Recipe, reference: str, models: dict[str, str], set_name: str, samples: int, process: Process
) -> Comparison:
    """Score the first samples of a held-out set of the recipe under every model, in the recipe's layout. Collective.

    reference, models: checkpoints, run folders or Hugging Face folders. Raises UserError for one that does not fit.
    """
    paths = {"reference": reference, **models}
    found = from_rank_0(lambda: _find_all(recipe, paths), process.device)
    groups = initialize_groups(recipe.parallel, recipe.seed, recipe.compute.collective_timeout_s)
    meta = found["reference"][1]
    tokenizer = recipe_tokenizer(recipe) or meta.tokenizer
    vocab_size = min(one.model_shape().vocab_size for _, one in found.values())
    source = datasets.open_source(recipe.data.eval[set_name], recipe.data, vocab_size, tokenizer)
    held_out = datasets.HeldOut(source, recipe.data, samples)
    check_documents(recipe, held_out.eod_id, vocab_size)
    dealt = DealtSamples(recipe, held_out, groups, process.device)
    kept = [dealt.held_out.sample(n) for n in range(dealt.held_out.length)]
    mask = np.stack([one["loss_mask"] for one in kept]) > 0
    if not mask.any():
        raise UserError(f"data.eval.{set_name}: the mask keeps no token of its first {len(kept)} samples")
    segments = np.stack([one["segment_ids"] for one in kept]) if "segment_ids" in kept[0] else None
    comparer = _Comparer(recipe, groups, dealt, process, found)
    reference_nll = np.where(mask, comparer.reference_nll(), 0.0).astype(np.float32)
    _check_numbers("--reference", reference_nll, mask)
    results = {}
    for name in models:
        nll, kl = comparer.nll_and_kl(name)
        _check_numbers(f"--models {name}", nll + kl, mask)
        results[name] = ModelTokens(
            nll=np.where(mask, nll, 0.0).astype(np.float32),
            kl=np.where(mask, kl, 0.0).astype(np.float32),
            weight=_weights(recipe, nll, reference_nll, mask, segments),
        )
    return Comparison(
        set_name=set_name,
        tokens=np.stack([one["labels"] for one in kept]).astype(np.int32),
        mask=mask,
        reference_nll=reference_nll,
        models=results,
        sources=paths,
    )


def _check_numbers(flag: str, values: np.ndarray, mask: np.ndarray) -> None:
    wrong = int((~np.isfinite(values[mask])).sum())
    if wrong:
        raise UserError(
            f"{flag}: {wrong:,} of {int(mask.sum()):,} tokens have an NLL that is not a number: the model's weights "
            "are broken, or compute.precision is too low for it"
        )


def _find_all(recipe: Recipe, paths: dict[str, str]) -> dict[str, tuple[Path, Meta]]:
    """Every model's checkpoint and description. Raises UserError where one lacks or does not go with the reference."""
    check_document_mask(recipe)
    flags = {name: "--reference" if name == "reference" else f"--models {name}" for name in paths}
    found = {name: find_model(path, flags[name], recipe) for name, path in paths.items()}
    theirs = found["reference"][1]
    for name, (path, meta) in found.items():
        shape = meta.model_shape()
        check_layout(shape, recipe.parallel, name)
        one, other = _tokenizer(meta), _tokenizer(theirs)
        if one and other and not same_tokenizer(one, other):
            raise UserError(f"--models {name}: {path} was made with another tokenizer than the reference")
        # Of one tokenizer the rows past its ids are padding, and the KL is over the rows that both have.
        if shape.vocab_size != theirs.model_shape().vocab_size and not (one and other):
            raise UserError(
                f"--models {name}: the vocabulary of {path} has {shape.vocab_size} rows, the reference's "
                f"{theirs.model_shape().vocab_size}, and nothing shows that one tokenizer made both: models are "
                "compared token by token"
            )
    return found


def _tokenizer(meta: Meta) -> str | None:
    """Identity of a model's tokenizer: of the folder it was converted from, or of the datasets it was trained on."""
    return (meta.origin or {}).get("tokenizer") or meta.tokenizer


def _weights(
    recipe: Recipe, nll: np.ndarray, reference_nll: np.ndarray, mask: np.ndarray, segments: np.ndarray | None
) -> np.ndarray:
    """ReMiT's weights with the recipe's settings; with the paper's where the recipe has another objective."""
    objective = recipe.build_objective()
    settings = objective if isinstance(objective, Remit) else Remit()
    by_document = settings.centering == "document" and segments is not None
    weights = remit_weights(
        torch.from_numpy(np.where(mask, nll, 0.0)),
        torch.from_numpy(reference_nll),
        torch.from_numpy(mask),
        segment_ids=torch.from_numpy(segments) if by_document else None,
        epsilon=settings.epsilon,
        clip=settings.clip,
    )
    return weights.numpy()


class _Comparer:
    """Holds the reference; the other models come one after the other. Methods are collective."""

    def __init__(
        self,
        recipe: Recipe,
        groups: Groups,
        dealt: DealtSamples,
        process: Process,
        found: dict[str, tuple[Path, Meta]],
    ):
        self.recipe, self.dealt, self.process, self.found = recipe, dealt, process, found
        self.build = Build(
            device=process.device,
            dtype=training_dtype(recipe, process.device.type),
            implementation=recipe.model.implementation,
            loss_implementation=recipe.compute.loss_implementation,
            head_chunk_tokens=recipe.reference.head_chunk_tokens if recipe.reference else HEAD_CHUNK_TOKENS,
        )
        path, meta = found["reference"]
        ensure_converted(path, meta)
        length = recipe.data.sequence_length
        self.reference = Reference(meta.model_shape(), path, recipe.parallel, self.build, max_sequence_length=length)
        self.groups = groups

    def reference_nll(self) -> np.ndarray:
        """[n, s] float32, nats."""
        parts: list[torch.Tensor] = []
        for first, last in self._spans("reference"):
            parts += passes.nll(self.reference.chunks, self.dealt.microbatches(first, last), self.groups)
        return self.dealt.whole(parts).numpy()

    def nll_and_kl(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Both [n, s] float32, nats, of one of the other models."""
        path, meta = self.found[name]
        ensure_converted(path, meta)
        length = self.recipe.data.sequence_length
        chunks: list[Any]
        chunks, _ = build_chunks(meta.model_shape(), self.recipe.parallel, self.build, max_sequence_length=length)
        dist_checkpoint.load_model(path, chunks)
        for chunk in chunks:
            chunk.eval()
        parts: list[torch.Tensor] = []
        for first, last in self._spans(name):
            microbatches = self.dealt.microbatches(first, last)
            parts += passes.nll_and_kl(chunks, self.reference.chunks, microbatches, self.groups)
        del chunks
        gc.collect()
        nll, kl = (self.dealt.whole([part[i] for part in parts]).numpy() for i in (0, 1))
        return nll, kl

    def _spans(self, name: str) -> Any:
        """(first, last) microbatch of each call of the schedule; rank 0 says how far it is."""
        dealt = self.dealt
        size = max(dealt.round, self.recipe.parallel.pipeline) * ROUNDS_AT_A_TIME
        for first in range(0, dealt.count, size):
            last = min(first + size, dealt.count)
            yield first, last
            if self.process.rank == 0:
                tokens = last * dealt.deal.turn_samples * dealt.length
                print(f"{name}: {tokens:,} tokens scored", file=sys.stderr, flush=True)
