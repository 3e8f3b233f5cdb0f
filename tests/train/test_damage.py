"""Checkpoints that a disk or an enemy has changed: refused by file name, passed over by --fallback, never run."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.data import checksums
from remit_megatron.errors import DamagedError
from remit_megatron.run.checkpoint import CheckpointFolder, Meta, read_meta
from tests.ranks import run_ranks
from tests.train.runs import metrics, remit, settings, train_all

NEWEST, OLDER = "step-00000012", "step-00000006"
SHARD = "__1_0.distcp"


def flip(path: Path, at: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Name of the case: what it does to a checkpoint folder, and what the refusal names. Two are trained from.
TRAINED = ("missing", "one bit")
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda c: (c / SHARD).unlink(), f"{SHARD} is missing"),
    "truncated": (lambda c: os.truncate(c / SHARD, 1000), f"{SHARD} has 1,000 bytes in place of "),
    "one bit": (lambda c: flip(c / SHARD), f"{SHARD} has changed: its SHA-256 is not the one it was written with"),
    "one bit of .metadata": (lambda c: flip(c / ".metadata"), ".metadata has changed"),
    "one bit of common.pt": (lambda c: flip(c / "common.pt"), "common.pt has changed"),
    "one bit of the manifest": (lambda c: flip(c / "manifest.json", 60), "manifest.json is damaged"),
    "one bit of meta.json": (lambda c: flip(c / "meta.json"), "meta.json"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "no meta.json": (lambda c: (c / "meta.json").unlink(), f"latest names {NEWEST}, which is not complete"),
}


def start_all(rank: int, folder: Path) -> tuple[Any, Any]:
    """On one of two ranks: start from damaged copies of one run, as they are and with --fallback."""
    import torch.distributed as dist

    layout = {"parallel": {"tensor": 2}}
    assert train_all(rank, [settings(folder, "sound", **layout)]) == [(0, "")]
    if rank == 0:
        for name in TRAINED:
            shutil.copytree(folder / "sound", folder / name)
            DAMAGES[name][0](folder / name / "checkpoints" / NEWEST)
        shutil.copytree(folder / "sound", folder / "both")
        for path in (folder / "both" / "checkpoints").glob("step-*"):
            (path / SHARD).unlink()
        shutil.copytree(folder / "base", folder / "damaged base")
        flip(folder / "damaged base" / "checkpoints" / NEWEST / "__0_0.distcp")
    dist.barrier()
    recipes = [settings(folder, name, **layout) for name in (*TRAINED, "both")]
    guided = remit(folder, "guided by damage", reference={"path": str(folder / "damaged base")}, **layout)
    return train_all(rank, [*recipes, guided]), train_all(rank, recipes, fallback=True)


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    first, second = run_ranks(2, start_all, folder)
    assert first == second, "every rank says the same"
    names = [*TRAINED, "both", "reference"]
    return {key: dict(zip(names, found, strict=False)) for key, found in zip(("refused", "back"), first, strict=True)}


@pytest.mark.parametrize("pointer", ["", "../../elsewhere\n", "step-00000099\n"])
def test_a_pointer_to_nothing(folder: Path, outcomes: dict[str, Any], tmp_path: Path, pointer: str) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    shutil.copytree(folder / "sound" / "checkpoints", checkpoints.folder)
    (checkpoints.folder / "latest").write_text(pointer)
    with pytest.raises(DamagedError, match=f"which is not complete: restore it; or start with .*{NEWEST}"):
        checkpoints.latest()
    named = checkpoints.named()
    assert named is not None
    assert [path.name for path in checkpoints.before(named)] == [NEWEST, OLDER]
    checkpoints.pass_over([named], checkpoints.before(named)[0])
    assert checkpoints.latest() == checkpoints.folder / NEWEST
    assert len(list(checkpoints.folder.iterdir())) == 3


def test_a_pointer_that_is_no_file(tmp_path: Path) -> None:
    """As when somebody links `latest` to a checkpoint: it is named, with the remedy, and a link to nothing too."""
    folder = CheckpointFolder(tmp_path, keep=1)
    (tmp_path / NEWEST).mkdir()
    for target in (NEWEST, "nowhere"):
        (tmp_path / "latest").symlink_to(target)
        with pytest.raises(DamagedError, match=rf"{tmp_path}/latest cannot be read \(.*\): write the newest"):
            folder.latest()
        (tmp_path / "latest").unlink()


@pytest.mark.parametrize("name", DAMAGES)
def test_found(folder: Path, outcomes: dict[str, Any], tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(folder / "sound" / "checkpoints", checkpoints)
    read_meta(checkpoints / NEWEST)
    assert problems(checkpoints / NEWEST) == []
    damage(checkpoints / NEWEST)
    try:
        path = CheckpointFolder(checkpoints, keep=1).latest()
        assert path is not None
        read_meta(path)
        found = problems(path)
    except DamagedError as error:
        found = [str(error)]
    assert len(found) == 1
    assert message in found[0]


def problems(checkpoint: Path) -> list[str]:
    return checksums.problems(checkpoint, checksums.read(checkpoint), content=True)


@pytest.mark.parametrize("name", TRAINED)
def test_refused_by_name_and_passed_over(folder: Path, outcomes: dict[str, Any], name: str) -> None:
    code, message = outcomes["refused"][name]
    assert code == 2, message
    assert DAMAGES[name][1] in message
    assert f"start with --fallback to go on from {OLDER}" in message
    assert outcomes["back"][name] == (0, "")
    assert metrics(folder, name) == metrics(folder, "sound")
    log = (folder / name / "log.txt").read_text()
    assert f"--fallback: {NEWEST} is passed over and set aside: " in log
    assert f"resumes from {OLDER}" in log
    checkpoints = folder / name / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["damaged-00000012", "latest", OLDER, NEWEST]
    assert checksums.whole(checkpoints / NEWEST)


def test_nothing_to_fall_back_to(outcomes: dict[str, Any]) -> None:
    for code, message in (outcomes["refused"]["both"], outcomes["back"]["both"]):
        assert code == 2
        assert f"{NEWEST}: {SHARD} is missing" in message
    assert f"{OLDER}: {SHARD} is missing" in outcomes["back"]["both"][1]


def test_a_damaged_reference_is_refused(outcomes: dict[str, Any]) -> None:
    code, message = outcomes["refused"]["reference"]
    assert code == 2
    assert "__0_0.distcp has changed" in message


def test_retention_keeps_the_last_good_one(tmp_path: Path) -> None:
    """keep = 2, and both of the newest turn out cut: the good one before them stays, older ones go."""
    folder = CheckpointFolder(tmp_path, keep=2)

    def save(step: int) -> Path:
        partial = folder.begin(step)
        (partial / "__0_0.distcp").write_bytes(bytes(100))
        checksums.write(partial, checksums.of_files([partial / "__0_0.distcp"]))
        return folder.commit(Meta(shape={}, step=step))

    saved = [save(step) for step in (1, 2, 3)]
    assert [path.exists() for path in saved] == [False, True, True]
    os.truncate(saved[2] / "__0_0.distcp", 99)
    later = save(4)
    assert saved[1].exists(), "the only whole one beside the newest"
    assert folder.latest() == later
    last = save(5)
    assert not saved[1].exists()
    assert later.exists()
    assert last.exists()


def test_retention_does_not_follow_a_link(tmp_path: Path) -> None:
    """To another disk, where a user has moved a checkpoint: the link goes and what it names stays."""
    folder, moved = CheckpointFolder(tmp_path / "checkpoints", keep=1), tmp_path / "moved"

    def save(step: int) -> Path:
        partial = folder.begin(step)
        (partial / "__0_0.distcp").write_bytes(bytes(100))
        checksums.write(partial, checksums.of_files([partial / "__0_0.distcp"]))
        return folder.commit(Meta(shape={}, step=step))

    first = save(1)
    os.rename(first, moved)
    first.symlink_to(moved)
    assert folder.latest() == first
    second = save(2)
    assert sorted(path.name for path in folder.folder.iterdir()) == ["latest", second.name]
    assert checksums.problems(moved, checksums.read(moved), content=True) == []
    assert (moved / "meta.json").exists()


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plant(rank: int, folder: Path) -> list[str]:
    """Save a model, put the payload in each place that holds a pickle, and load it; what each load said."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from remit_megatron.config import Parallel
    from remit_megatron.mcore import dist_checkpoint
    from remit_megatron.mcore.groups import initialize_groups
    from remit_megatron.mcore.model import build_chunks
    from remit_megatron.mcore.platform import activate
    from tests.mcore.harness import BUILD, STUDENT

    activate("cpu")
    initialize_groups(Parallel(), seed=1)
    chunks, _ = build_chunks(STUDENT, Parallel(), BUILD, max_sequence_length=8)

    def saved(name: str, payload: Any = None) -> Path:
        target = folder / name
        target.mkdir()
        state = dist_checkpoint.model_state(chunks)
        objects = [leaf for leaf in nested_values(state) if isinstance(leaf, ShardedObject)]
        if payload is not None:
            objects[0].data = payload
        original, dist_checkpoint.model_state = dist_checkpoint.model_state, lambda _: state
        try:
            dist_checkpoint.save(target, chunks, None)
        finally:
            dist_checkpoint.model_state = original
        return target

    def sealed(target: Path) -> Path:
        """With checksums that fit, as an enemy would leave it."""
        checksums.write(target, checksums.of_files(p for p in target.iterdir() if p.name != "manifest.json"))
        return target

    payload = Payload(folder / "owned")
    common, described = saved("common"), saved("described")
    torch.save({"content_metadata": {}, "x": payload}, common / "common.pt")
    metadata = pickle.loads((described / ".metadata").read_bytes())  # noqa: S301 - made above
    metadata.planner_data = payload
    (described / ".metadata").write_bytes(pickle.dumps(metadata))
    hidden = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
    cases = [sealed(common), sealed(described), saved("object", payload), saved("hidden", hidden)]
    said = []
    for case in [saved("clean"), *cases]:
        try:
            dist_checkpoint.load_model(case, chunks)
            said.append("loaded")
        except DamagedError as error:
            said.append(str(error))
    return said


def test_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(FileNotFoundError):
        pickle.load(io.BytesIO(pickle.dumps(Payload(tmp_path / "no" / "folder"))))  # noqa: S301 - it is armed
    (said,) = run_ranks(1, plant, tmp_path)
    clean, common, described, stored, hidden = said
    assert clean == "loaded"
    assert "common.pt: refused: " in common
    assert "mkdir" in common
    assert ".metadata: refused: it names posix.mkdir" in described
    assert "its object " in stored
    assert "mkdir" in stored
    assert "it holds a pickle for Transformer Engine" in hidden
    assert not (tmp_path / "owned").exists()


class Attribute:
    """Pickled as Python 3.11.2 pickles the member of an enumeration."""

    def __init__(self, of: Any, name: str):
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def test_attributes_in_metadata(tmp_path: Path) -> None:
    """Members of the enumerations that a description has are read, and nothing is reached through another class."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    from remit_megatron.mcore.checkpoint_read import Reader

    (tmp_path / ".metadata").write_bytes(
        pickle.dumps(Metadata({}, Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")))
    )
    assert Reader(tmp_path).read_metadata().planner_data is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, Attribute(Metadata, "__init__"))))
    with pytest.raises(DamagedError, match="refused: it asks for an attribute"):
        Reader(tmp_path).read_metadata()


def test_paths_of_python_3_13(tmp_path: Path) -> None:
    """Pickled under the module in which that version alone has them."""
    from pathlib import PurePosixPath

    from torch.distributed.checkpoint.metadata import Metadata

    from remit_megatron.mcore.checkpoint_read import Reader

    written = pickle.dumps(Metadata({}, PurePosixPath("a")), protocol=2)  # whose names are text, of any length
    module = PurePosixPath.__module__.encode()
    assert written.count(module + b"\n") == 1
    (tmp_path / ".metadata").write_bytes(written.replace(module + b"\n", b"pathlib._local\n"))
    assert Reader(tmp_path).read_metadata().planner_data == PurePosixPath("a")
