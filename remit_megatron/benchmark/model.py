"""Which weights are evaluated: a Hugging Face folder as it is, or a checkpoint that is exported to one first."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.convert.hub import local_folder
from remit_megatron.errors import RunError, UserError
from remit_megatron.hf import tokenizer
from remit_megatron.hf.config import read_json
from remit_megatron.hf.folder import HFFolder, is_hf_folder
from remit_megatron.run.checkpoint import Meta, identity, read_meta, resolve_checkpoint
from remit_megatron.run.hf_source import RANK_VARIABLES

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TEXT_FILES = ("generation_config.json", *tokenizer.FILES)


@dataclass(frozen=True, slots=True)
class Model:
    """What is evaluated."""

    source: str
    """As the user named it."""
    identity: str
    """16 hex digits of the weights, the config and the tokenizer's files."""
    like: Path
    """The folder with config and tokenizer; of a Hugging Face folder, itself."""
    checkpoint: Path | None
    """What has to be exported first; None: `like` holds the weights."""
    standing: dict[str, Any] | None = None
    """Of a checkpoint of a run: `run` (the folder), `step`, `tokens`, and `identity` of its content."""


def find_model(name: str, like: str | None, chat: bool) -> Model:
    """Read what MODEL names. Writes nothing.

    like: of a checkpoint, the Hugging Face folder whose config and tokenizer it has. chat: whether a chat template is
    needed. Raises UserError for what cannot be evaluated, and says why.
    """
    path = Path(name)
    if is_hf_folder(path) or not path.exists():
        if like is not None:
            raise UserError(f"--like goes with a checkpoint, and MODEL {name} is none")
        folder = local_folder(name, "MODEL")
        _check_text_files(folder, chat)
        return Model(name, _digest(HFFolder(folder).content_key(), folder), folder, None)
    checkpoint = resolve_checkpoint(name, "MODEL")
    meta = read_meta(checkpoint)
    if like is None:
        raise UserError(
            f"MODEL {name} is a checkpoint, which has no tokenizer: name the Hugging Face folder whose config and "
            "tokenizer it has with --like"
        )
    from remit_megatron.convert.exporter import check_alike
    from remit_megatron.hf.mapping import read_shape

    folder = local_folder(like, "--like")
    check_alike(meta.model_shape(), read_shape(read_json(folder / "config.json"), folder / "config.json"), folder)
    _check_text_files(folder, chat)
    weights = identity(checkpoint)
    return Model(name, _digest(weights, folder), folder, checkpoint, _standing(checkpoint, meta, weights))


def _standing(checkpoint: Path, meta: Meta, weights: str) -> dict[str, Any] | None:
    """Where its run stood; None of a checkpoint that lies in no run."""
    place = checkpoint.absolute().parent  # of a link, where it stands, not where it leads
    if place.name != "checkpoints":
        return None
    return {"run": str(place.parent.resolve()), "step": meta.step, "tokens": meta.tokens, "identity": weights}


def weights_folder(model: Model, output: Path) -> Path:
    """The Hugging Face folder to evaluate; a checkpoint's is written once, as `output`/model-IDENTITY, and kept.

    Raises UserError or RunError where the export fails.
    """
    if model.checkpoint is None:
        return model.like.absolute()
    folder = export_place(model, output)
    if folder.is_dir():
        return folder
    print(f"remit: exporting {model.checkpoint} to {folder}, once", file=sys.stderr, flush=True)
    command = ["convert", "export", str(model.checkpoint), str(folder), "--like", str(model.like)]
    done = subprocess.run(  # a process of its own gives its memory back
        [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *command],
        env={**without_ranks(), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("remit: ")
        raise (UserError if done.returncode == UserError.exit_code else RunError)(f"exporting {model.source}: {line}")
    return folder


def export_place(model: Model, output: Path) -> Path:
    """Where a checkpoint's weights are written."""
    return output.absolute() / f"model-{model.identity}"


def without_ranks() -> dict[str, str]:
    """The environment, without what makes a process believe that it is a rank of several."""
    return {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}


def _check_text_files(folder: Path, chat: bool) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{folder}: has no tokenizer ({', '.join(TOKENIZERS)}): copy the model's own there")
    if chat and not any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        settings = folder / "tokenizer_config.json"
        if not (settings.is_file() and read_json(settings).get("chat_template")):
            raise UserError(
                f"{folder}: has no chat template (chat_template.jinja, or in tokenizer_config.json), which the "
                "post-trained suite needs: copy the one that the model was trained with there"
            )


def _digest(weights: str, folder: Path) -> str:
    total = hashlib.sha256(f"remit benchmark 1\n{weights}\n".encode())
    for name in ("config.json", *TEXT_FILES):
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()[:16]
