"""`--fallback`: go on from the newest checkpoint that is whole, and say which were passed over and why."""

from pathlib import Path

import torch

from remit_megatron.errors import DamagedError, UserError
from remit_megatron.mcore.checkpoint_read import verify
from remit_megatron.run.checkpoint import CheckpointFolder, read_meta
from remit_megatron.run.process import from_rank_0


def newest_whole(folder: CheckpointFolder, device: torch.device) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and the newer ones with what is wrong with each. Reads all of them. Collective.

    None where the run has no checkpoint at all. Raises UserError where it has some, and none is whole.
    """
    passed_over: dict[Path, str] = {}
    candidates: list[Path] = from_rank_0(lambda: _candidates(folder), device)
    for path in candidates:
        try:
            verify(path)
            from_rank_0(lambda path=path: read_meta(path), device)  # type: ignore[misc]
        except DamagedError as error:
            passed_over[path] = str(error)
            continue
        return path, passed_over
    if passed_over:
        raise UserError(f"--fallback: no checkpoint of the run is whole: {'; '.join(passed_over.values())}")
    return None, {}


def _candidates(folder: CheckpointFolder) -> list[Path]:
    newest = folder.named()
    return [newest, *folder.before(newest)] if newest else []
