"""Checkpoint folders of a run: written beside, renamed into place, named by a pointer that never names a partial one.

checkpoints/step-00000100/   Megatron's distributed checkpoint, its manifest.json and meta.json
checkpoints/step-00000100/KEEP   an empty file: this one stays, however many newer ones there are
checkpoints/latest           the name of the newest complete one
checkpoints/damaged-00000200 one that --fallback has passed over
checkpoints/.replaced-00000100 for a moment, one whose step is saved again; a start after a kill brings it back
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.data import checksums
from remit_megatron.data.files import fsync_folder, write_atomically, writing
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.mcore.megatron_lm import checkpoint as megatron_lm
from remit_megatron.mcore.megatron_lm.shapes import shape_of
from remit_megatron.outside import quote, read_object
from remit_megatron.shape import ModelShape

FORMAT = 1
NAMES = "step-" + "[0-9]" * 8
"""Of complete checkpoints; whatever else lies beside them, a copy made by hand for instance, is nobody's business."""
KEEP = "KEEP"
BYTES_PER_PARAMETER = 14
"""Of a checkpoint in bf16: its weights, and float32 weights and two moments of AdamW."""
IDENTITY_BYTES = 1 << 20
LATER = ("skipped", "broken", "settings", "held_out", "manifest")
"""Fields of meta.json that are left out where they have no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What a checkpoint says of itself: meta.json."""

    shape: dict[str, Any]
    """ModelShape of the model."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Tokens trained on. The data position follows from `step`."""
    bad_steps: int = 0
    """Steps in a row, up to this one, that were skipped for a gradient norm that is not finite."""
    recipe: str = ""
    """Fingerprint of the recipe."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the training datasets by path."""
    tokenizer: str | None = None
    """Hash of the tokenizer the datasets were made with."""
    distributed_optimizer: bool = True
    precision: str = "fp32"
    loggers: dict[str, str] = field(default_factory=dict)
    """Identities that external loggers need to go on in the same run."""
    reference: str | None = None
    """Identity of the reference that guided the run; see `identity`."""
    origin: dict[str, str] | None = None
    """Where the weights were converted from; none: they were trained here."""
    skipped: int | None = None
    """Steps of the run, up to this one, that updated nothing. None, as in `settings`, `held_out` and `manifest`: of a
    version that did not say it."""
    broken: str | None = None
    """Of the run's last step: why the run is not called done."""
    settings: str | None = None
    """Of the recipe, what a resume must have in common; see `remit_megatron.run.folder.settings_digest`."""
    held_out: dict[str, str] | None = None
    """Content of the held-out sets by name: fingerprint and number of samples."""
    manifest: str | None = None
    """SHA-256 of the manifest.json beside it; filled in by `write_meta`."""
    format: int = FORMAT

    def model_shape(self) -> ModelShape:
        return ModelShape(**self.shape)


class CheckpointFolder:
    """`checkpoints/` of a run. Writing methods are for rank 0; the others only read."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def named(self) -> Path | None:
        """What the pointer names; without a pointer the newest one that looks complete."""
        pointer = self.folder / "latest"
        if not os.path.lexists(pointer):
            # A kill between the two renames of the very first commit leaves a complete checkpoint without a pointer.
            complete = sorted(meta.parent for meta in self.folder.glob(f"{NAMES}/meta.json"))
            return complete[-1] if complete else None
        try:
            return self.folder / (Path(pointer.read_text(errors="replace").strip()).name or "nothing")
        except OSError as error:
            raise DamagedError(
                f"{pointer} cannot be read ({error.strerror}): "
                "write the newest checkpoint's name into a file of that name"
            ) from None

    def latest(self) -> Path | None:
        """The newest complete checkpoint. Raises DamagedError when the pointer names one that is not there."""
        path = self.named()
        if path is not None and not (path / "meta.json").exists():
            raise self.refusal(path, f"{self.folder / 'latest'} names {path.name}, which is not complete")
        return path

    def refusal(self, path: Path, problem: object) -> DamagedError:
        """That the run does not go on from `path`, with the remedy."""
        older = self.before(path)
        remedy = f"or start with --fallback to go on from {older[0].name}" if older else "there is no older one"
        return DamagedError(f"{problem}: restore it; {remedy}")

    def before(self, path: Path) -> list[Path]:
        """Complete checkpoints older than `path`, the newest first; all of them where its name is no checkpoint's."""
        complete = sorted((meta.parent for meta in self.folder.glob(f"{NAMES}/meta.json")), reverse=True)
        return [found for found in complete if found.name < path.name or not path.name.startswith("step-")]

    def pass_over(self, damaged: list[Path], chosen: Path) -> None:
        """Go on from `chosen`: the damaged ones get another name. Raises RunError where that cannot be."""
        with writing(self.folder):
            self._point_to(chosen)
            for path in damaged:
                aside = self.folder / f"damaged-{path.name.removeprefix('step-')}"
                shutil.rmtree(aside, ignore_errors=True)
                if path.exists() and path.name.startswith("step-"):
                    os.rename(path, aside)
            fsync_folder(self.folder)

    def partial(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it is complete."""
        return self.folder / f".partial-{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write into; what an interrupted save left behind is removed."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".partial-*"):
                shutil.rmtree(leftover)
            self.recover()
            self.partial(step).mkdir()
        return self.partial(step)

    def recover(self) -> None:
        """Bring back what a killed process had moved aside and not replaced, and remove what it was removing. For the
        holder of the run's lock."""
        with writing(self.folder):
            for aside in self.folder.glob(".replaced-*"):
                final = self.folder / f"step-{aside.name.removeprefix('.replaced-')}"
                if (final / "meta.json").exists():
                    _remove(aside)
                else:
                    os.rename(aside, final)
            rotating = self._rotating()
            newest = [path for path in rotating if checksums.whole(path)][-self.keep :]
            for old in rotating:
                if len(newest) == self.keep and old < newest[0] and not (old / "meta.json").exists():
                    _remove(old)

    def _rotating(self) -> list[Path]:
        """Checkpoints that `keep` decides about, the oldest first."""
        return [path for path in sorted(self.folder.glob(NAMES)) if not (path / KEEP).exists()]

    def kept(self) -> list[Path]:
        """Complete checkpoints that stay whatever `keep` says, the oldest first."""
        marked = (path.parent for path in self.folder.glob(f"{NAMES}/{KEEP}"))
        return sorted(path for path in marked if (path / "meta.json").exists())

    def commit(self, meta: Meta, *, stays: bool = False) -> Path:
        """Make a written checkpoint the newest one, and remove those past `keep`. Raises RunError where it cannot.

        stays: this one is never among those that are removed or counted, nor is one that it takes the place of.
        """
        with writing(self.folder):
            return self._commit(meta, stays)

    def _commit(self, meta: Meta, stays: bool) -> Path:
        partial, final = self.partial(meta.step), self.folder / f"step-{meta.step:08d}"
        if stays or (final / KEEP).exists():
            write_atomically(partial / KEEP, b"")
        write_meta(partial, meta)
        aside = self.folder / f".replaced-{meta.step:08d}"
        if os.path.lexists(final):  # saved by an earlier process, perhaps killed before it moved the pointer
            os.rename(final, aside)
        os.rename(partial, final)
        fsync_folder(self.folder)
        self._point_to(final)
        if os.path.lexists(aside):
            _remove(aside)
        rotating = self._rotating()
        # Only whole ones count towards `keep`: the last good one never goes because of damaged ones after it.
        newest = [path for path in rotating if checksums.whole(path)][-self.keep :]
        for old in rotating:
            if old.name < min([final, *newest]).name:
                _remove(old)
        return final

    def _point_to(self, path: Path) -> None:
        write_atomically(self.folder / "latest", f"{path.name}\n".encode())


def _remove(checkpoint: Path) -> None:
    """The meta goes first: a folder that lost only some of its files must not look complete."""
    if checkpoint.is_symlink():  # to where a user has moved it
        checkpoint.unlink()
        return
    (checkpoint / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def resolve_checkpoint(path: str, key: str) -> Path:
    """A checkpoint folder, or the newest one of a run folder. Raises UserError naming the recipe key."""
    folder = Path(path)
    if (folder / "meta.json").exists():
        return folder
    if megatron_lm.is_megatron_lm(folder):
        return megatron_lm.resolve(folder, key)
    if (folder / "checkpoints").is_dir():
        try:
            latest = CheckpointFolder(folder / "checkpoints", keep=1).latest()
        except DamagedError as error:
            raise UserError(f"{key} = '{path}': {error}") from None
        if latest is not None:
            return latest
        raise UserError(f"{key} = '{path}': the run has no complete checkpoint yet")
    what = "is no checkpoint or run folder" if folder.exists() else "does not exist"
    raise UserError(
        f"{key} = '{path}' {what}: name a checkpoint (a folder with meta.json, or one of Megatron-LM), a run "
        "folder, or a Hugging Face folder (with config.json)"
    )


def write_meta(folder: Path, meta: Meta) -> None:
    """Write meta.json, the last file of a checkpoint, bound to the manifest there is. Raises RunError where it cannot
    be written."""
    content = {key: value for key, value in asdict(meta).items() if value is not None or key not in LATER}
    if (folder / checksums.NAME).exists():
        content["manifest"] = _manifest_digest(folder)
    content["checksum"] = checksums.own_checksum(content)
    write_atomically(folder / "meta.json", json.dumps(content, indent=1).encode())


def read_meta(folder: Path, vocab_size: int | None = None) -> Meta:
    """Raises UserError when meta.json is unreadable, of another format, damaged, or not of this checkpoint.

    Of a checkpoint that Megatron-LM wrote, and that has no meta.json, it is made of its arguments; vocab_size: its rows
    of the vocabulary without padding; default: all.
    """
    if not (folder / "meta.json").exists() and megatron_lm.is_megatron_lm(folder):
        return describe(folder, vocab_size)
    try:
        fields = read_object(folder / "meta.json")
        if fields.get("format") == FORMAT:
            checksum = fields.pop("checksum", None)
            meta = Meta(**fields)
            meta.model_shape()
    except (UserError, ValueError, TypeError) as error:
        reason = quote(" ".join(str(error).split()))
        raise DamagedError(
            f"checkpoint {folder}: meta.json cannot be read, or is of another version of this program: {reason}"
        ) from None
    if fields.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder}: format {quote(fields.get('format'))}, this program reads {FORMAT}")
    if checksum != checksums.own_checksum(fields):
        raise DamagedError(f"checkpoint {folder}: meta.json has changed: its own checksum does not match")
    if re.fullmatch(NAMES, folder.name) and int(folder.name.removeprefix("step-")) != meta.step:
        raise DamagedError(f"checkpoint {folder}: its meta.json is of step {meta.step}: the files of two checkpoints")
    if meta.manifest is not None:
        checksums.read(folder)
        if meta.manifest != _manifest_digest(folder):
            raise DamagedError(
                f"checkpoint {folder}: its meta.json belongs to another manifest.json than the one there"
            )
    return meta


def describe(folder: Path, vocab_size: int | None = None) -> Meta:
    """What a checkpoint of Megatron-LM says of itself. Raises UserError for a model that is not built here."""
    arguments = megatron_lm.saved_arguments(folder)
    shape = shape_of(arguments, folder, vocab_size)
    iteration = re.fullmatch(r"iter_(\d+)", folder.name)
    return Meta(
        shape=shape.model_dump(),
        step=int(iteration[1]) if iteration else 0,
        precision="bf16" if getattr(arguments, "bf16", False) else "fp32",
        distributed_optimizer=bool(getattr(arguments, "use_distributed_optimizer", False)),
        origin={"format": megatron_lm.ORIGIN, "source": str(folder), "content": identity(folder)},
    )


def _manifest_digest(folder: Path) -> str:
    return hashlib.sha256((folder / checksums.NAME).read_bytes()).hexdigest()


def identity(folder: Path) -> str:
    """Content of a checkpoint: meta.json, and of each weight file the size, the first and the last MiB. 32 hex digits.

    Two steps of one run differ in it, and so do two models; a large checkpoint is not read whole.
    """
    described = folder / "meta.json"
    digest = hashlib.sha256((described if described.exists() else folder / megatron_lm.METADATA).read_bytes())
    for path in sorted(folder.glob("*.distcp")):
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - IDENTITY_BYTES)):
                stream.seek(start)
                digest.update(stream.read(IDENTITY_BYTES))
    return digest.hexdigest()[:32]
