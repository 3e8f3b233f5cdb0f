"""What is looked at before a suite starts: how prompts are split and begin, and whether logits are finite."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.benchmark.model import Model, without_ranks
from remit_megatron.data.indexed import open_index
from remit_megatron.data.manifest import Manifest
from remit_megatron.data.tokenizer import load_tokenizer, same_tokenizer, tokenizer_hash
from remit_megatron.errors import RemitError, RunError, UserError
from remit_megatron.hf.tokenizer import TEXTS, has_tokenizer
from remit_megatron.outside import parse_object, quote
from remit_megatron.run.checkpoint import read_meta

SCRIPT = """
import json, sys
import torch, transformers
folder, device, wanted = sys.argv[1], sys.argv[2], json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
split = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
differ = [[text, split(text), ids] for text, ids in wanted if split(text) != ids]
plain, whole = split("x"), list(tokenizer("x")["input_ids"])
begins = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else whole
said = {"differ": differ, "begins": begins, "finite": None, "why": None}
try:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").to(device).eval()
    with torch.no_grad():
        logits = model(torch.tensor([split("In 2023 the sum of 17 and 4 is 21.") or [0]], device=device)).logits
    said["finite"] = all(bool(torch.isfinite(each.float()).all()) for each in (logits, *model.parameters()))
except (RuntimeError, OSError, ValueError, KeyError) as error:
    said["why"] = " ".join(str(error).split())[:200]
print(json.dumps(said))
"""
DOCUMENTS = 100
"""Of a training dataset, as many are looked at for the token that they begin with."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found, as `results.json` keeps it."""

    record: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        return list(self.record["warnings"])


def check_model(python: str, device: str | None, found: Model, folder: Path, versions: Mapping[str, str]) -> Checked:
    """Compare lm_eval's tokenizer with tokenizer.json and with the training data, and compute logits once.

    folder: the weights. Raises UserError where a logit is not finite: lm_eval would give such a model figures, some of
    them perfect.
    """
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    wanted = [(t, tokenizer.encode(t, add_special_tokens=False).ids) for t in TEXTS] if tokenizer else []
    done = subprocess.run(
        [python, "-c", SCRIPT, str(folder), device or ""],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=without_ranks(),
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{python} cannot load the tokenizer of {folder} as lm_eval does: {quote(reason)}")
    said = parse_object(lines[-1], f"what {python} says of {folder}")
    if said["finite"] is False:
        raise UserError(
            f"MODEL {found.source}: its weights or logits are not finite, and lm_eval would give it figures all the "
            "same: evaluate an earlier checkpoint"
        )
    warnings = [*_splitting(said, wanted, versions), *_beginning(said["begins"], found)]
    if said["finite"] is None:
        warnings.append(f"the logits could not be looked at before the start: {said['why']}")
    record = {"begins_with": said["begins"], "texts": len(wanted), "differ": len(said["differ"]), "warnings": warnings}
    return Checked({**record, "versions": dict(versions)})


def _splitting(said: Mapping[str, Any], wanted: list[Any], versions: Mapping[str, str]) -> list[str]:
    if not said["differ"]:
        return []
    text, theirs, ours = min(said["differ"], key=lambda each: len(each[0]))
    return [
        f"AutoTokenizer of transformers {versions.get('transformers')}, which lm_eval uses, splits "
        f"{len(said['differ'])} of {len(wanted)} texts otherwise than tokenizer.json, which `remit data tokenize` "
        f"uses: {quote(json.dumps(text), 60)} becomes {quote(str(theirs), 60)} for {quote(str(ours), 60)}"
    ]


def _beginning(begins: list[int], found: Model) -> list[str]:
    """What the training data say of the prompts' first token and of the tokenizer."""
    warnings = []
    data = read_meta(found.checkpoint).data if found.checkpoint else {}
    seen = False
    for prefix in data:
        try:
            manifest, indexed = Manifest.read(prefix), open_index(prefix)
        except RemitError:
            continue
        seen = True
        known = manifest.tokenizer_hash if manifest and has_tokenizer(found.like) else None
        if known and not same_tokenizer(known, tokenizer_hash(found.like)):
            warnings.append(f"the tokenizer of {found.like} is not the one that {prefix} was made with")
        number = min(DOCUMENTS, indexed.num_documents)
        starts = sum(indexed.document(i)[: len(begins)].tolist() == begins for i in range(number)) if begins else 0
        if begins and starts < number:
            warnings.append(
                f"prompts begin with the tokens {begins}, which {number - starts} of {number} documents of {prefix} "
                "do not"
            )
    if begins and not seen:
        warnings.append(
            f"prompts begin with the tokens {begins}: `remit data tokenize` writes none at the beginning of a "
            "document, and what this model was trained on is not known here"
        )
    return warnings
