"""`remit analyze tokens`: from a recipe and checkpoints to a folder of figures, pictures and coloured text."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from remit_megatron.analysis.comparison import Comparison
from remit_megatron.analysis.heatmap import page
from remit_megatron.analysis.margins import summarise, token_table
from remit_megatron.analysis.plots import plot_comparison
from remit_megatron.analysis.score import compare_models
from remit_megatron.config import Recipe
from remit_megatron.data.files import check_place, make_folder, write_atomically, writing
from remit_megatron.errors import UserError
from remit_megatron.evaluate import open_tokenizer
from remit_megatron.run.process import from_rank_0, joined_process


def analyze_tokens(
    recipe: Recipe,
    *,
    reference: str | None,
    models: dict[str, str],
    set_name: str | None,
    samples: int,
    show: int,
    output: Path,
) -> None:
    """Write tokens.parquet, summary.json, distributions.png and, with data.tokenizer, margins.html into `output`.

    Called on every rank. reference: default reference.path. set_name: default the first of data.eval. show: samples as
    coloured text. Raises UserError for what does not fit, before anything is written.
    """
    if not recipe.data.eval:
        raise UserError("remit analyze tokens compares on held-out text: name a set in data.eval")
    name = set_name or next(iter(recipe.data.eval))
    if name not in recipe.data.eval:
        raise UserError(f"--on {name}: data.eval has {', '.join(recipe.data.eval)}")
    reference = reference or (recipe.reference.path if recipe.reference else None)
    if reference is None:
        raise UserError("--reference CHECKPOINT is needed: the recipe has no reference.path")
    tokenizer = open_tokenizer(recipe) if recipe.data.tokenizer else None
    with joined_process(recipe.compute) as process:
        from_rank_0(lambda: check_place(output, "--output"), process.device)
        comparison = compare_models(recipe, reference, models, name, samples, process)
        from_rank_0(lambda: _write(comparison, tokenizer, show, output), process.device)


def _write(comparison: Comparison, tokenizer: Any, show: int, output: Path) -> None:
    """On rank 0. Everything is made before anything is written."""
    text_of: Callable[[int], str] | None = None
    files: dict[str, bytes] = {}
    if tokenizer:

        def text_of(token: int) -> str:
            return str(tokenizer.decode([token], skip_special_tokens=False))

        texts = [words(tokenizer, row.tolist()) for row in comparison.tokens[:show]]
        files["margins.html"] = page(comparison, texts).encode()
    summary = summarise(comparison, text_of)
    content = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    files["summary.json"] = (content + "\n").encode()
    sink = pa.BufferOutputStream()
    pq.write_table(token_table(comparison), sink)
    files["tokens.parquet"] = sink.getvalue().to_pybytes()
    files["distributions.png"] = plot_comparison(comparison)
    make_folder(output, "--output")
    for name, data in files.items():
        write_atomically(output / name, data)
    if not tokenizer:
        with writing(output):
            (output / "margins.html").unlink(missing_ok=True)  # of an earlier comparison
        print("remit: margins.html needs data.tokenizer: left out", file=sys.stderr)
    print(report(summary))


def words(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each id adds to those before it; empty where a character is not complete yet.

    Bytes that are no text give U+FFFD, and decoding starts anew after them.
    """
    from tokenizers.decoders import DecodeStream

    stream, found = DecodeStream(skip_special_tokens=False), []
    for token in ids:
        try:
            found.append(stream.step(tokenizer, token) or "")
        except Exception:  # noqa: BLE001 - the library raises no narrower one
            found.append("\ufffd")
            stream = DecodeStream(skip_special_tokens=False)
    return found


def report(summary: dict[str, Any]) -> str:
    """Markdown, a row a model."""
    head = ["model", "NLL", "mean margin", "reference surer", "model surer", "top 5% hold", "mean KL", "weight std"]
    rows = [head, ["---"] * len(head)]
    rows.append(["reference", f"{summary['reference_nll']:.4f}", *["-"] * (len(head) - 2)])
    for name, one in summary["models"].items():
        shares = (one["share_reference_surer"], one["share_model_surer"])
        held = "-" if one["concentration"] is None else f"{one['concentration']['0.05']:.1%}"
        rows.append(
            [
                name,
                f"{one['nll']:.4f}",
                f"{one['margin']['mean']:+.4f}",
                *(f"{share:.1%}" for share in shares),
                held,
                f"{one['kl']['mean']:.4f}",
                f"{one['weight']['std']:.3f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"{summary['tokens']:,} tokens of {summary['set']}; NLL, margin and KL in nats."])
