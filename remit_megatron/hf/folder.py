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

from remit_megatron.data.files import sync_file, write_atomically
from remit_megatron.errors import RunError, UserError
from remit_megatron.hf.config import read_json, shown
from remit_megatron.hf.mapping import family_of, tensor_shapes
from remit_megatron.outside import parse_object, quote
from remit_megatron.shape import ModelShape

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PAIR = frozenset((HEAD, EMBEDDING))
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of tensors in a safetensors header: torch's names of them."""
COMPUTED = ".rotary_emb.inv_freq"
"""A table that the config determines. Llama checkpoints of old hold it, and transformers drops it when it loads one."""
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_BYTES = 255
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

    Raises UserError naming the file: no safetensors, a missing or truncated shard, an index that leaves the folder,
    names absent tensors or leaves some out, a tensor of which two shards hold different values, or one of a type other
    than float32, bfloat16 and float16.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        if (path / ADAPTER).exists():
            raise UserError(
                f"{path}: {ADAPTER} lies in it, and other programs then load an adapter beside the weights: merge it "
                "into the weights (peft: merge_and_unload), or remove the adapter's files"
            )
        self.tensors: dict[str, Stored] = {}
        self.stands_for: dict[str, str] = {}
        """Names that a tensor is read as, where another is stored: of a tied pair that was written once."""
        places = self._read_index()
        self.shards = self._list_shards(places)
        holders: dict[str, set[str]] = {}
        for shard in self.shards:
            for name, stored in _read_header(path / shard, shard).items():
                holders.setdefault(name, set()).add(shard)
                if name not in self.tensors:
                    self.tensors[name] = stored
                elif not self._same(self.tensors[name], stored, name):
                    raise UserError(
                        f"{path}: {_some([name])} is in {self.tensors[name].shard} and in {shard}, with other values"
                    )
        if places is not None:
            self._check_index(places, holders)
        for name in [name for name in self.tensors if name.endswith(COMPUTED)]:
            del self.tensors[name]

    def _read_index(self) -> dict[str, str] | None:
        """Where the index says that tensors are; None without an index."""
        if not (self.path / INDEX).exists():
            return None
        places = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
            raise UserError(f"{self.path / INDEX}: has no weight_map from tensors to files")
        for name, shard in places.items():
            if Path(shard).name != shard or len(shard.encode()) > MAX_NAME_BYTES or "\0" in shard:
                raise UserError(
                    f"{self.path / INDEX}: {_some([name])} is in {shown(shard)}, which is no file name: an index names "
                    "files of its own folder"
                )
        return places

    def _list_shards(self, places: dict[str, str] | None) -> list[str]:
        if places is not None:
            shards = sorted(set(places.values()))
            if SINGLE not in shards and (self.path / SINGLE).exists():
                raise UserError(
                    f"{self.path}: has {SINGLE}, which transformers loads, and {INDEX}, which names other files: two "
                    "models in one folder; remove the files of one"
                )
        elif (self.path / SINGLE).exists():
            shards = [SINGLE]
        else:
            old = " (pytorch_model.bin is not read: save it as safetensors)" if any(self.path.glob("*.bin")) else ""
            raise UserError(f"{self.path}: has neither {SINGLE} nor {INDEX}{old}")
        for shard in shards:
            if not (self.path / shard).is_file():
                raise UserError(f"{self.path / shard}: missing, though {INDEX} names it")
        return shards

    def _check_index(self, places: dict[str, str], holders: dict[str, set[str]]) -> None:
        absent = [name for name, shard in places.items() if shard not in holders.get(name, ())]
        # A tied pair may be written once and listed under both names.
        once = PAIR if places.get(HEAD) == places.get(EMBEDDING) and self.tensors.keys() & PAIR else frozenset()
        absent = [name for name in absent if name not in once]
        if absent:
            raise UserError(f"{self.path / INDEX}: lists {_some(absent)}, which the shards named there do not hold")
        unlisted = self.tensors.keys() - places.keys()
        if unlisted:
            raise UserError(f"{self.path / INDEX}: leaves out {_some(unlisted)}, which the shards hold")

    def _same(self, one: Stored, other: Stored, name: str) -> bool:
        return one.shape == other.shape and _equal(self.path, (one.shard, name), (other.shard, name))

    def dtypes(self) -> set[str]:
        """Names of the tensors' types, as `Stored.dtype`."""
        return {stored.dtype for stored in self.tensors.values()}

    def __iter__(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Every tensor once, shard by shard; one is in memory at a time. Raises UserError for an unreadable shard."""
        for shard in self.shards:
            try:
                with safe_open(self.path / shard, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - no mapping
                        if name not in self.tensors or self.tensors[name].shard == shard:
                            yield self.stands_for.get(name, name), tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / shard}: cannot be read: {error}") from None

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, some rows at a time."""
        a, b = self.tensors[one], self.tensors[other]
        return a.shape == b.shape and _equal(self.path, (a.shard, one), (b.shard, other))

    def content_key(self) -> str:
        """Sixteen hex digits that change with any byte of the config's or the tensors' files. Reads all of them."""
        total = hashlib.sha256(b"remit checkpoint from hugging face 1\n")
        for name in ["config.json", *self.shards]:
            with (self.path / name).open("rb") as stream:
                total.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()[:16]


def check_tensors(folder: HFFolder, shape: ModelShape) -> None:
    """Raise UserError unless the folder holds exactly the tensors of a shape, before memory for any is asked for.

    A tied head that is stored all the same must equal the embedding, and is not read; one that is stored in the
    embedding's place is read as the embedding.
    """
    # Counted first: a number of layers that is wrong by some digits would name more tensors than memory holds.
    if shape.num_layers * len(family_of(shape).layer) > len(folder.tensors):
        raise UserError(
            f"{folder.path}: {len(folder.tensors)} tensors are fewer than {shape.num_layers} layers have, which "
            f"config.json asks for: {_some(_first_missing(folder, shape))} is missing"
        )
    wanted = tensor_shapes(shape)
    names = _names(folder, wanted.keys(), tied=shape.tied_embeddings)
    for name in sorted(names):
        stored = folder.tensors[next((own for own, read in folder.stands_for.items() if read == name), name)]
        if stored.shape != wanted[name]:
            raise UserError(f"{folder.path}: {name} is {list(stored.shape)}, config.json asks for {list(wanted[name])}")


def _first_missing(folder: HFFolder, shape: ModelShape) -> list[str]:
    """The first tensor of a shape that a folder lacks; none where it has all of them."""
    layer = [name for parts in family_of(shape).layer.values() for name in parts]
    for number in range(shape.num_layers):
        for name in layer:
            if f"model.layers.{number}.{name}" not in folder.tensors:
                return [f"model.layers.{number}.{name}"]
    return []


def _names(folder: HFFolder, wanted: Set[str], *, tied: bool) -> set[str]:
    """The names of the tensors to read, as the model has them. Raises UserError unless they are the wanted ones."""
    names = set(folder.tensors)
    if tied and HEAD in names and EMBEDDING in names:
        if not folder.equal(HEAD, EMBEDDING):
            raise UserError(
                f"{folder.path}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}: set "
                "tie_word_embeddings = false if the model was trained with a head of its own"
            )
        names.remove(HEAD)
    elif tied and HEAD in names:
        folder.stands_for[HEAD] = EMBEDDING
        names = (names - {HEAD}) | {EMBEDDING}
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


def _equal(path: Path, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two (shard, tensor) of one shape hold the same values, some rows at a time."""
    import torch

    with ExitStack() as stack:
        slices = [
            stack.enter_context(safe_open(path / shard, framework="pt")).get_slice(name) for shard, name in (one, other)
        ]
        shape = slices[0].get_shape()
        for start in range(0, shape[0] if shape else 1, COMPARE_ROWS):
            first, second = (s[start : start + COMPARE_ROWS] if shape else s[:] for s in slices)
            if not torch.equal(first.float(), second.float()):
                return False
    return True


def _read_header(path: Path, shard: str) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: no safetensors file, or truncated")
        try:
            header = parse_object(stream.read(length), "its header")
        except UserError as error:
            raise UserError(f"{path}: no safetensors file: {error}") from None
    if not all(_describes(v) for k, v in header.items() if k != "__metadata__"):
        raise UserError(f"{path}: no safetensors file: its header does not describe tensors")
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise UserError(f"{path}: truncated or damaged: {size:,} bytes, its header promises {shown(8 + length + end)}")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {_some([name])} is of type {shown(entry['dtype'])}; only {', '.join(DTYPES)} are supported"
            )
    try:
        with safe_open(path, framework="numpy"):  # it checks that every byte belongs to one tensor
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return {name: Stored(shard, DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}


def _describes(entry: Any) -> bool:
    """Whether a value of a header is that of a tensor: a type, sizes, and where its bytes begin and end."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    return len(offsets or ()) == 2 and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    sizes: dict[str, int],
    max_shard_bytes: int,
) -> None:
    """Write tensors, in the order given, as shards of at most max_shard_bytes, with an index where there are several.

    sizes: bytes of each tensor, by name, in the same order: they fix the shards before the first is written. Raises
    RunError where the disk refuses.
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
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise RunError(
                f"{folder / file}: cannot be written: {' '.join(str(error).split())[:200]}: free space there, or name "
                "another folder, then start the same command again"
            ) from None
        sync_file(folder / file)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _some(names: Collection[str]) -> str:
    shown_names = ", ".join(quote(name, 100) for name in sorted(names)[:3]) or "none"
    return shown_names + (f" and {len(names) - 3} more" if len(names) > 3 else "")
