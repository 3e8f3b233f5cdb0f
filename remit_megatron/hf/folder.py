"""The weights of a Hugging Face folder: safetensors, read one tensor at a time and written with a fresh index.

To open a folder and look at what it holds takes no torch, which is imported where tensors are read or written.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from remit_megatron.errors import UserError
from remit_megatron.hf.config import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of tensors in a safetensors header: torch's names of them."""
COMPUTED = ".rotary_emb.inv_freq"
"""A table that the config determines. Llama checkpoints of old hold it, and transformers drops it when it loads one."""
MAX_HEADER_BYTES = 100_000_000
COMPARE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk."""

    shard: str
    dtype: str
    """float32, bfloat16 or float16."""
    shape: tuple[int, ...]


def is_hf_folder(path: str | Path) -> bool:
    """Whether a path is a folder with config.json and no checkpoint of this package's own."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / "meta.json").exists()


class HFFolder:
    """config.json and the tensors of a folder, checked against its index and the files' sizes when opened.

    Raises UserError naming the file: no safetensors, a missing or truncated shard, an index that names absent tensors
    or leaves some out, a tensor in two shards or of a type other than float32, bfloat16 and float16.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self.tensors: dict[str, Stored] = {}
        self.shards = self._list_shards()
        for shard in self.shards:
            for name, stored in _read_header(path / shard, shard).items():
                if name in self.tensors:
                    raise UserError(f"{path}: {name} is in {self.tensors[name].shard} and in {shard}")
                self.tensors[name] = stored
        if (path / INDEX).exists():
            self._check_index(read_json(path / INDEX)["weight_map"])
        for name in [name for name in self.tensors if name.endswith(COMPUTED)]:
            del self.tensors[name]

    def _list_shards(self) -> list[str]:
        if (self.path / INDEX).exists():
            index = read_json(self.path / INDEX)
            places = index.get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
                raise UserError(f"{self.path / INDEX}: has no weight_map from tensors to files")
            shards = sorted(set(places.values()))
        elif (self.path / SINGLE).exists():
            shards = [SINGLE]
        else:
            old = " (pytorch_model.bin is not read: save it as safetensors)" if any(self.path.glob("*.bin")) else ""
            raise UserError(f"{self.path}: has neither {SINGLE} nor {INDEX}{old}")
        for shard in shards:
            if not (self.path / shard).is_file():
                raise UserError(f"{self.path / shard}: missing, though {INDEX} names it")
        return shards

    def _check_index(self, places: dict[str, str]) -> None:
        absent = [name for name, shard in places.items() if name not in self.tensors or
                  self.tensors[name].shard != shard]  # fmt: skip
        if absent:
            raise UserError(f"{self.path / INDEX}: lists {_some(absent)}, which the shards named there do not hold")
        unlisted = self.tensors.keys() - places.keys()
        if unlisted:
            raise UserError(f"{self.path / INDEX}: leaves out {_some(unlisted)}, which the shards hold")

    def dtypes(self) -> set[str]:
        """Names of the tensors' types, as `Stored.dtype`."""
        return {stored.dtype for stored in self.tensors.values()}

    def __iter__(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Every tensor, shard by shard; one is in memory at a time. Raises UserError for an unreadable shard."""
        for shard in self.shards:
            try:
                with safe_open(self.path / shard, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - no mapping
                        yield name, tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / shard}: cannot be read: {error}") from None

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, some rows at a time."""
        import torch

        a, b = self.tensors[one], self.tensors[other]
        if a.shape != b.shape:
            return False
        with ExitStack() as stack:
            slices = [
                stack.enter_context(safe_open(self.path / self.tensors[name].shard, framework="pt")).get_slice(name)
                for name in (one, other)
            ]
            for start in range(0, a.shape[0], COMPARE_ROWS):
                first, second = (s[start : start + COMPARE_ROWS] for s in slices)
                if not torch.equal(first.float(), second.float()):
                    return False
        return True

    def content_key(self) -> str:
        """Sixteen hex digits that change with any byte of the config's or the tensors' files. Reads all of them."""
        total = hashlib.sha256(b"remit checkpoint from hugging face 1\n")
        for name in ["config.json", *self.shards]:
            with (self.path / name).open("rb") as stream:
                total.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()[:16]


def check_names(folder: HFFolder, wanted: Set[str], *, tied: bool) -> set[str]:
    """The names of the tensors to read. Raises UserError unless the folder holds exactly the wanted ones.

    A tied head that is stored all the same must equal the embedding, and is not read.
    """
    names = set(folder.tensors)
    if tied and HEAD in names and EMBEDDING in names:
        if not folder.equal(HEAD, EMBEDDING):
            raise UserError(
                f"{folder.path}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}: set "
                "tie_word_embeddings = false if the model was trained with a head of its own"
            )
        names.remove(HEAD)
    missing, unexpected = wanted - names, names - wanted
    if missing == {HEAD}:
        raise UserError(f"{folder.path}: {HEAD} is missing, and config.json does not tie the embeddings")
    if missing or unexpected:
        raise UserError(
            f"{folder.path}: {len(missing)} tensors are missing ({_some(missing)}) and {len(unexpected)} are unknown "
            f"({_some(unexpected)})"
        )
    return names


def choose_dtype(folder: HFFolder, asked: str | None = None) -> str:
    """The type of the converted weights, by name: the one asked for, else the folder's own, so that nothing is rounded.

    Raises UserError where the folder mixes types or has float16, which training does not use.
    """
    if asked is not None:
        return asked
    stored = folder.dtypes()
    if len(stored) > 1:
        names = ", ".join(sorted(stored))
        raise UserError(f"{folder.path}: its tensors are of types {names}: choose one with --dtype of convert import")
    (only,) = stored
    if only not in ("float32", "bfloat16"):
        raise UserError(
            f"{folder.path}: float16 weights: choose --dtype of convert import, fp32, which holds them exactly, or bf16"
        )
    return only


def _read_header(path: Path, shard: str) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: no safetensors file, or truncated")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"{path}: no safetensors file: its header is no JSON") from None
    try:
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        entries = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (AttributeError, IndexError, KeyError, TypeError):
        raise UserError(f"{path}: no safetensors file: its header does not describe tensors") from None
    if 8 + length + end != size:
        raise UserError(f"{path}: truncated or damaged: {size:,} bytes, its header promises {8 + length + end:,}")
    for name, (dtype, _) in entries.items():
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name} is of type {dtype}; only {', '.join(DTYPES)} are supported")
    try:
        with safe_open(path, framework="numpy"):  # it checks that every byte belongs to one tensor
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return {name: Stored(shard, DTYPES[dtype], shape) for name, (dtype, shape) in entries.items()}


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, "torch.Tensor"]], sizes: dict[str, int], max_shard_bytes: int
) -> None:
    """Write tensors, in the order given, as shards of at most max_shard_bytes, with an index where there are several.

    sizes: bytes of each tensor, by name, in the same order: they fix the shards before the first is written.
    """
    from safetensors.torch import save_file

    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if plan[-1] and filled + size > max_shard_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    files = [SINGLE] if len(plan) == 1 else [
        f"model-{i:05d}-of-{len(plan):05d}.safetensors" for i in range(1, len(plan) + 1)
    ]  # fmt: skip
    source = iter(tensors)
    for file, names in zip(files, plan, strict=True):
        shard = dict(next(source) for _ in names)
        assert list(shard) == names
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
