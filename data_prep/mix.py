"""`remit data mix` and `index`: what a recipe's sources give a run, and its sample indices built ahead."""

from dataclasses import asdict, dataclass
from typing import Any

from remit_megatron.config import Recipe
from remit_megatron.data.manifest import quick_verify
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import UserError

MANY_EPOCHS = 4.0
"""Repeating data more often than this is worth little (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True, slots=True)
class Share:
    """One source's part in a run."""

    path: str
    weight: float
    """Share of the samples, normalised to a sum of 1."""
    tokens: int
    """Tokens that the source has."""
    epoch_samples: int
    """Samples of data.sequence_length that one pass over it gives."""
    run_samples: int
    """Samples that the run takes from it, exact to one sample."""
    run_tokens: int
    epochs: float
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def mix(recipe: Recipe) -> list[Share]:
    """What each source gives the run, in the order of the recipe. Raises UserError for a source that cannot be used."""
    length = recipe.data.sequence_length
    total = recipe.train_steps * recipe.global_batch_samples
    weights = sum(source.weight for source in recipe.data.train)
    shares = []
    made_with = _tokenizer(recipe)
    for source in recipe.data.train:
        info = quick_verify(source.path, vocab_size=recipe.model.vocab_size, tokenizer_hash=made_with)
        epoch_samples = (info.num_tokens - 1) // length
        if epoch_samples < 1:
            raise UserError(
                f"{source.path}: {info.num_tokens} tokens are fewer than one sample of "
                f"data.sequence_length + 1 = {length + 1}"
            )
        weight = source.weight / weights
        run_samples = round(weight * total)
        epochs = run_samples / epoch_samples
        warnings = list(info.warnings)
        if epochs > MANY_EPOCHS:
            warnings.append(
                f"{source.path}: {epochs:.1f} epochs; above {MANY_EPOCHS:g} repeated data is worth little: lower its "
                "weight or train on fewer tokens"
            )
        shares.append(
            Share(source.path, weight, info.num_tokens, epoch_samples, run_samples, run_samples * length, epochs,
                  tuple(warnings))
        )  # fmt: skip
    return shares


def table(shares: list[Share]) -> str:
    """The shares as text, warnings last."""
    width = max(len("source"), *(len(share.path) for share in shares))
    lines = [f"{'source':{width}}  {'share':>7}  {'tokens':>17}  {'of run':>17}  {'epochs':>8}"]
    lines += [
        f"{s.path:{width}}  {100 * s.weight:6.2f}%  {s.tokens:17,}  {s.run_tokens:17,}  {s.epochs:8.3f}" for s in shares
    ]
    lines.append(
        f"{'total':{width}}  {'':7}  {sum(s.tokens for s in shares):17,}  {sum(s.run_tokens for s in shares):17,}"
    )
    return "\n".join(lines + [f"warning: {warning}" for share in shares for warning in share.warnings])


def build_indices(recipe: Recipe) -> list[str]:
    """Build or check the sample index of every source, training and held-out. Returns a line for each."""
    from remit_megatron.mcore.datasets import open_source  # only this command needs Megatron

    vocab_size = recipe.model.vocab_size or 1 << 31
    paths = [source.path for source in recipe.data.train] + list(recipe.data.eval.values())
    lines = []
    for path in dict.fromkeys(paths):
        source = open_source(path, recipe.data, vocab_size, _tokenizer(recipe))
        lines.append(f"{path}: {len(source):,} samples of {recipe.data.sequence_length} tokens indexed")
    return lines


def _tokenizer(recipe: Recipe) -> str | None:
    """Hash of the tokenizer that a run of the recipe holds its datasets to."""
    return tokenizer_hash(recipe.data.tokenizer) if recipe.data.tokenizer else None
