"""A Hugging Face folder by path, or by the id of a hub that is asked for it."""

import re
from pathlib import Path

from remit_megatron.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "merges.txt", "*.jinja"]


def local_folder(name: str, key: str) -> Path:
    """The folder of that path, or the downloaded files of `org/name` or `org/name@revision`.

    Raises UserError naming `key` when there is no such folder and no hub answers.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(f"{key} {name}: has no config.json: name a Hugging Face folder")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{key} {name}: does not exist, and is no hub id (org/name, or org/name@revision)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key} {name}: no such folder here, and the hub did not give it (a hub id needs a network): {first}"
        ) from None
