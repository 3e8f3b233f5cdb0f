"""Run the wheel: one stage after the other, each under its lock, from parents that are what their manifests say."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from remit_megatron.data.files import locked, make_folder, writing
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.flywheel.card import write_card
from remit_megatron.flywheel.config import Wheel
from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.evaluate import run_benchmark
from remit_megatron.flywheel.graph import BENCHMARK, MID, Node, Plan, Source, make_plan
from remit_megatron.flywheel.mid import prepare_mid, run_mid
from remit_megatron.flywheel.state import Record, identity_now, lock_of, recorded_parents
from remit_megatron.posttrain.contract import KEEP, checksum_folder, model_identity, read_manifest, verify, write_spec
from remit_megatron.posttrain.engines import Workers
from remit_megatron.posttrain.stage import run_stage

OLD = "old"
"""Below the wheel's folder: stages whose parents are other models now."""
Execute = Callable[[Node], None]


def run_wheel(file: Path, wheel: Wheel, until: str | None, elsewhere: Execute | None = None) -> None:
    """Run all stages that are not done, or those that one of them needs.

    elsewhere: what runs a stage, with its lock and checks, in place of this process. Raises UserError before anything
    is written where the file, its data or the folder will not do.
    """
    contents = open_contents(wheel)
    plan = make_plan(wheel, contents)
    wanted = plan.nodes if until is None else plan.needed_for(until)
    claim(file, wheel)
    busy = f"wheel = '{wheel.folder}': another process runs this wheel: wait for it or stop it"
    with locked(wheel.folder / ".lock", busy), Workers() as workers:
        contents.save()
        for node in wanted:
            if is_done(node, contents):
                write_card(node, plan)  # a kill may have come between the manifest and the card
                continue
            _say(f"{node.name}: runs in {node.folder}")
            if elsewhere:
                elsewhere(node)
            else:
                run_node(node, plan, contents, workers)
            manifest = read_manifest(node.folder)
            if manifest is None:
                raise UserError(f"{node.name}: ended without a manifest: see {node.folder}")
            _say(f"{node.name}: done in {manifest.seconds:.0f} s")


def claim(file: Path, wheel: Wheel) -> None:
    """Make the wheel's folder. Raises UserError where it is another wheel's."""
    make_folder(wheel.folder, "wheel")
    Record(wheel.folder).claim(file)
    with writing(wheel.folder):
        (wheel.folder / "stages").mkdir(exist_ok=True)


def open_contents(wheel: Wheel) -> Contents:
    return Contents(wheel.folder / ".contents.json")


def run_node(
    node: Node, plan: Plan, contents: Contents, workers: Workers | None = None, *, prepare: bool = False
) -> None:
    """Run one stage, or go on with it; one that is done from the same parents is left alone.

    prepare: only until mid-training may start, which is somebody else's to do. Raises UserError where another process
    runs it or a parent will not do, and what its engine's end means.
    """
    busy = f"{node.name}: another process runs this stage in {node.folder}: wait for it or stop it"
    with locked(lock_of(node), busy):
        if is_done(node, contents):
            return
        parents = {role: _verified(source, contents) for role, source in node.parents.items()}
        _set_aside(node, parents)
        Record(plan.wheel.folder).begin(node)
        with writing(node.folder):
            node.folder.mkdir(exist_ok=True)
        if prepare:
            prepare_mid(node, plan, parents)
            return
        if node.kind == MID:
            run_mid(node, plan, parents)
        elif node.kind == BENCHMARK:
            run_benchmark(node, parents)
        else:
            request = {"name": node.folder.name, "parents": parents}
            write_spec(node.folder, node.request.model_copy(update=request))
            run_stage(node.folder, workers)
        write_card(node, plan)


def is_done(node: Node, contents: Contents) -> bool:
    """Whether its manifest names the models that its parents' manifests name."""
    manifest = read_manifest(node.folder)
    if manifest is None:
        return False
    return all(manifest.parents.get(role) == identity_now(one, contents) for role, one in node.parents.items())


def _verified(source: Source, contents: Contents) -> str:
    """The identity of a parent, whose files have been read and are what its manifest says. Raises UserError else."""
    if source.node is None:
        return contents.model(source.path, source.name)
    if not is_done(source.node, contents):
        raise UserError(f"{source.name} is not done: run it first, as `remit flywheel run` without --only does")
    manifest = verify(source.node.folder)
    if source.kept is None:
        return manifest.identity
    path = source.node.folder / KEEP / source.kept
    if not path.is_dir() or model_identity(checksum_folder(path)) != manifest.kept.get(source.kept):
        raise DamagedError(
            f"{path}: is not what stage {source.node.name} kept: remove {source.node.folder} to make it again"
        )
    return manifest.kept[source.kept]


def _set_aside(node: Node, parents: dict[str, str]) -> None:
    """Move a stage that was made, or begun, from other models out of the way."""
    manifest = read_manifest(node.folder)
    known = recorded_parents(node.folder) if manifest is None else manifest.parents
    if known is None or known == parents:
        return
    old = node.folder.parent.parent / OLD
    with writing(old):
        old.mkdir(exist_ok=True)
        number = next(i for i in range(1, sys.maxsize) if not (old / f"{node.folder.name}.{i}").exists())
        os.rename(node.folder, old / f"{node.folder.name}.{number}")
    _say(f"{node.name}: was made from another model: moved to {old / f'{node.folder.name}.{number}'}")


def _say(text: str) -> None:
    print(f"remit: {text}", file=sys.stderr, flush=True)
