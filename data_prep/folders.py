"""What lies in a folder of text: every file is read, or named as left out with the reason."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.work import WORK_SUFFIX
from remit_megatron.errors import UserError

SUFFIXES = {
    **{f"{text}{packed}": f"jsonl{kind}"
       for text in (".jsonl", ".ndjson", ".json")
       for packed, kind in (("", ""), (".gz", ".gz"), (".zst", ".zst"), (".zstd", ".zst"))},
    ".parquet": "parquet", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
"""Endings that are read, and what a file with them is."""
PACKED = (".gz", ".zst", ".zstd")
CARDS = (
    *("README.md", "README.txt", "LICENSE", "LICENSE.md", "LICENSE.txt", "dataset_infos.json", "dataset_info.json"),
    *("_SUCCESS", "_metadata", "_common_metadata", "MD5SUMS", "SHA256SUMS", "md5sums.txt", "sha256sums.txt"),
)
"""What describes a dataset in its folder: no input where the folder holds data of another kind than plain text."""
OUR_SUFFIXES = (".manifest.json", ".bad.jsonl", ".select.json", ".bin", ".idx")

UNKNOWN = "of an ending that is not read"
NOWHERE = "a link to nothing"
SPECIAL = "no regular file"
HIDDEN = "hidden"
OURS = "of a tokenized dataset"
CARD = "describes the others"
AGAIN = "a link back to a folder that holds it"
EMPTY = "empty"
REFUSED = (UNKNOWN, NOWHERE, SPECIAL)
"""Reasons that need the user's word; the others leave out what is no text of the corpus."""
OF_THE_CORPUS = (*REFUSED, CARD)
"""What a manifest counts: of the text's folder, and not of what this program or a file browser put into it."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, or a folder that is left out or is one saved dataset."""

    path: Path
    left_out: str | None = None
    """Why it is not read."""


def walk(root: Path) -> list[Entry]:
    """Everything below a folder, sorted by path; links are followed. Raises UserError for what cannot be looked at.

    What would count twice is refused: a folder that two links lead to, a file beside its own archive.
    """
    seen: dict[tuple[int, int], Path] = {}
    entries = sorted(_walk(root, (), seen), key=lambda entry: entry.path)
    read = [entry for entry in entries if entry.left_out is None]
    _refuse_packed_twice(read)
    plain = all(_is_text(entry) for entry in read if entry.path.name not in CARDS)
    return [
        Entry(e.path, CARD)
        if e.path.name in CARDS and e.left_out in (None, UNKNOWN) and not (plain and _is_text(e))
        else e
        for e in entries
    ]


def _refuse_packed_twice(read: list[Entry]) -> None:
    names = {entry.path for entry in read}
    for entry in read:
        for packed in PACKED:
            if (twin := entry.path.with_name(f"{entry.path.name}{packed}")) in names:
                raise UserError(
                    f"{twin}: lies beside {entry.path.name}: if one was made from the other its documents would count "
                    "twice; move one away, or name the files themselves"
                )


def suffix_of(path: Path) -> str | None:
    """The known ending of a file's name."""
    name = path.name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` writes."""
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


def check_one_split(path: Path) -> None:
    """Raise UserError for a saved dataset of several splits."""
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: a saved dataset of several splits; name one of them: {splits}")


def refuse_unread(entries: list[Entry], where: str) -> None:
    """Raise UserError naming the files that nothing but the user's word may leave out."""
    unread = [entry for entry in entries if entry.left_out in REFUSED]
    if unread:
        shown = ", ".join(f"{entry.path} ({entry.left_out})" for entry in unread[:SHOWN])
        more = f" and {len(unread) - SHOWN:,} more" if len(unread) > SHOWN else ""
        raise UserError(
            f"{where}: {len(unread):,} file{'s' if len(unread) > 1 else ''} would be left out: {shown}{more}; read are "
            f"{', '.join(SUFFIXES)}: unpack or convert them, or leave them out with --skip-unknown"
        )


def describe(seen: int, read: int, left_out: Mapping[str, int], examples: Mapping[str, list[str]]) -> str:
    """One line: files seen, read, and left out with the reasons."""
    line = f"files: {seen:,} seen, {read:,} read, {sum(left_out.values()):,} left out"
    parts = []
    for reason, count in left_out.items():
        names = examples.get(reason, [])
        shown = f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""
        parts.append(f"{count:,} {reason}{shown}")
    return line + (f": {'; '.join(parts)}" if parts else "")


def count_left_out(entries: list[Entry]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """(how many for each reason, some of their paths)."""
    counts = Counter(entry.left_out for entry in entries if entry.left_out is not None)
    examples = {why: [str(e.path) for e in entries if e.left_out == why][:SHOWN] for why in sorted(counts)}
    return {reason: counts[reason] for reason in sorted(counts)}, examples


def _walk(folder: Path, above: tuple[tuple[int, int], ...], seen: dict[tuple[int, int], Path]) -> Iterator[Entry]:
    try:
        found = folder.stat()
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {error.strerror}") from None
    identity = (found.st_dev, found.st_ino)
    if identity in above:
        yield Entry(folder, AGAIN)
        return
    if identity in seen:
        raise UserError(f"{folder}: the same folder as {seen[identity]}; its documents would count twice")
    seen[identity] = folder
    for name in names:
        path = folder / name
        if name.startswith("."):
            yield Entry(path, HIDDEN)
        elif path.is_dir():
            if name.endswith(WORK_SUFFIX):
                yield Entry(path, OURS)
            elif is_saved_dataset(path):
                yield Entry(path)
            else:
                check_one_split(path)
                yield from _walk(path, (*above, identity), seen)
        else:
            yield Entry(path, _why_not(path))


def _why_not(path: Path) -> str | None:
    if not path.exists():
        return NOWHERE
    if not path.is_file():
        return SPECIAL
    if _is_ours(path):
        return OURS
    return None if suffix_of(path) else UNKNOWN


def _is_text(entry: Entry) -> bool:
    return SUFFIXES.get(suffix_of(entry.path) or "") == "text"


def _is_ours(path: Path) -> bool:
    """What this tool wrote into the folder that it reads."""
    prefixes = [str(path).removesuffix(ending) for ending in OUR_SUFFIXES if path.name.endswith(ending)]
    return any(os.path.exists(f"{prefix}{ending}") for prefix in prefixes for ending in (".idx", WORK_SUFFIX))
