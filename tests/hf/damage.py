"""Ways to damage a Hugging Face folder of a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def one_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a folder's tensors as one file, after a change."""
    tensors = tensors_of(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of the first shard, in the room that it has."""
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    change(header)
    path.write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )


def write_header(folder: Path, header: bytes) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def store_twice(folder: Path, factor: float) -> None:
    """Two shards, the norm in both of them, in the second one times `factor`."""
    tensors = tensors_of(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    names = sorted(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for number, part in enumerate(shards, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        held = {name: tensors[name] for name in part}
        held["model.norm.weight"] = tensors["model.norm.weight"] * (1 if number == 1 else factor)
        save_file(held, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def list_once(folder: Path, kept: str) -> None:
    """Of a tied pair one name is stored, and the index lists both."""
    tensors = tensors_of(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    head = tensors.pop("model.embed_tokens.weight")
    tensors[kept] = head
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    both = [*tensors, "model.embed_tokens.weight", "lm_head.weight"]
    places = dict.fromkeys(both, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def overlap(header: dict[str, Any]) -> None:
    first, second, *_ = header.values()
    first["data_offsets"], first["shape"] = second["data_offsets"], second["shape"]


def to_bin_only(folder: Path) -> None:
    for path in folder.glob("*safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def halve(dtype: torch.dtype, share: float = 1.0) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors)[: int(len(tensors) * share)]:
            tensors[name] = tensors[name].to(dtype)

    return lambda folder: one_file(folder, change)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: one_file(folder, lambda tensors: tensors.pop(name))


def add(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda folder: one_file(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
