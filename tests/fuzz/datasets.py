"""Datasets on disk: .idx, .bin and manifests, as `verify`, `merge` and `select` read them."""

from pathlib import Path

import numpy as np

import data_prep.inspect
import data_prep.merge
import data_prep.select  # noqa: F401 - here, and so by no fork
from data_prep.writer import write_dataset
from tests.fuzz.framework import Target, register

IDS = [[1, 2, 3], [4] * 30, [5, 6], [7]]


def prepare(folder: Path) -> None:
    for name in ("a", "b"):
        write_dataset(folder / name, IDS, vocab_size=20, eod_id=9, tokenizer_hash="aa", provenance={"command": "test"})
    np.save(folder / "large.npy", np.arange(4.0))
    np.save(folder / "small.npy", np.arange(4.0)[::-1].copy())


def without_manifest(folder: Path) -> None:
    prepare(folder)
    (folder / "a.manifest.json").unlink()


def unchanged(folder: Path, valid: Path) -> str | None:
    """Everything of a dataset with a manifest is under a checksum, so what passes holds the tokens of before."""
    for ending in (".bin", ".idx"):
        if (folder / f"a{ending}").read_bytes() != (valid / f"a{ending}").read_bytes():
            return f"a{ending} was changed, and passed"
    return None


def consistent(folder: Path, valid: Path) -> str | None:
    """Without a manifest bits of .bin may differ, but .idx must describe it: read here field by field."""
    raw, tokens = (folder / "a.idx").read_bytes(), (folder / "a.bin").stat().st_size
    count, marks = (int.from_bytes(raw[start : start + 8], "little") for start in (18, 26))
    width = {8: 2, 4: 4}.get(raw[17])
    if width is None or len(raw) != 34 + 12 * count + 8 * marks:
        return "its header does not fit its size"
    lengths = np.frombuffer(raw, "<i4", count, 34).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", count, 34 + 4 * count)
    starts = (np.cumsum(lengths) - lengths) * width
    sound = (lengths >= 0).all() and np.array_equal(starts, pointers) and lengths.sum() * width == tokens
    return None if sound else "its lengths and pointers do not fit .bin"


def merged(folder: Path, valid: Path) -> str | None:
    whole = (valid / "a.bin").read_bytes() + (valid / "b.bin").read_bytes()
    return None if (folder / "all.bin").read_bytes() == whole else "the merged tokens are not those of the datasets"


def selected(folder: Path, valid: Path) -> str | None:
    """The best half by the scores as numpy reads them."""
    large, small = (np.load(folder / f"{name}.npy") for name in ("large", "small"))
    if len(large) != len(IDS) or not np.isfinite([large, small]).all():
        return "scores that are none, or of another number of documents, passed"
    best = sorted(np.argsort(large.astype(float) - small.astype(float), kind="stable")[:2].tolist())
    wanted = [token for number in best for token in [*IDS[number], 9]]
    found = np.fromfile(folder / "best.bin", np.uint16).tolist()
    return None if found == wanted else f"kept {found}, not {wanted}"


DATASET = ("a.bin", "a.idx", "a.manifest.json")
register(Target("dataset.verify", prepare, DATASET, ("data", "verify", "a", "--full"), unchanged, share=2))
register(Target("dataset.idx", without_manifest, ("a.idx",), ("data", "verify", "a", "--full"), consistent, share=2))
register(
    Target("dataset.merge", prepare, DATASET, ("data", "merge", "a", "b", "--output", "all"), merged, ("b.*", "*.npy"))
)
register(
    Target(
        "dataset.select",
        prepare,
        ("large.npy", "small.npy"),
        ("data", "select", "a", "--large", "large.npy", "--small", "small.npy", "--keep", "0.5", "--output", "best"),
        selected,
        ("a.*",),
    )
)
