"""A Hugging Face folder as model.init or reference.path: converted once, into a cache that is keyed by its content.

The cache is `.converted/` beside the run folders, so runs of one place share it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from remit_megatron.data.files import writing
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.errors import RunError, UserError
from remit_megatron.hf.folder import HFFolder, check_tensors, choose_dtype
from remit_megatron.hf.mapping import read_shape
from remit_megatron.hf.tokenizer import has_tokenizer
from remit_megatron.run.checkpoint import Meta

FORMAT = "huggingface"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def plan_conversion(source: str, run: str) -> tuple[Path, Meta]:
    """Where the converted checkpoint of a folder is, or will be, and what its meta.json says or will say.

    Reads the weights for their hash, so one rank should plan for all. Raises UserError for a folder that cannot be
    converted.
    """
    folder = HFFolder(Path(source))
    shape = read_shape(folder.config, folder.path / "config.json")
    check_tensors(folder, shape)
    dtype = choose_dtype(folder)
    key = folder.content_key()
    return Path(run).parent / ".converted" / key, Meta(shape=shape.model_dump(), origin=origin(folder, key, dtype))


def origin(folder: HFFolder, content_key: str, dtype: str) -> dict[str, str]:
    """What a converted checkpoint says of where it came from. It may serve as a reference though it has no steps.

    dtype: of the converted weights: float32 or bfloat16.
    """
    known = {"tokenizer": tokenizer_hash(folder.path)} if has_tokenizer(folder.path) else {}
    return {"format": FORMAT, "source": str(folder.path), "content": content_key, "dtype": dtype, **known}


def ensure_converted(checkpoint: Path, meta: Meta | None) -> None:
    """Convert what `plan_conversion` planned, unless it is there. Collective. Raises UserError with the reason."""
    if meta is None or meta.origin is None or meta.origin["format"] != FORMAT:
        return
    problem = _from_first_rank(lambda: _convert(meta.origin["source"], checkpoint))  # type: ignore[index]
    if problem:
        raise UserError(problem)


def _convert(source: str, checkpoint: Path) -> str | None:
    """In a process of its own: this one may be bound to a GPU and to a process group of many ranks."""
    if (checkpoint / "meta.json").exists():
        return None
    with writing(checkpoint.parent):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    print(f"remit: converting {source} into {checkpoint}, once", file=sys.stderr, flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", "convert", "import", source]
    done = subprocess.run(
        [*command, str(checkpoint)],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0 or (checkpoint / "meta.json").exists():  # another run may have been first
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode == UserError.exit_code:
        return lines[-1].removeprefix("remit: ")
    raise RunError(f"converting {source} failed: {lines[-1]}")


def _from_first_rank(compute: Any) -> Any:
    """What `compute` gives on rank 0, on every rank; its error, too."""
    import torch  # by a rank that builds models; to plan a conversion takes none
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = compute()
        except (UserError, RunError, OSError) as error:
            outcome[1] = error
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(outcome, device=device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
