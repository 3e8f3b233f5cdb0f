"""A stage of mid-training: `remit train` in a process of its own, then the checkpoint as a Hugging Face folder."""

import json
import time
from pathlib import Path
from typing import Any

from remit_megatron.config import Recipe, dump_toml, parse_recipe
from remit_megatron.data.files import is_held, write_atomically, writing
from remit_megatron.data.manifest import quick_verify
from remit_megatron.errors import UserError
from remit_megatron.flywheel.graph import MID, Node, Plan
from remit_megatron.flywheel.process import remit
from remit_megatron.flywheel.state import LOG
from remit_megatron.hf.folder import HFFolder
from remit_megatron.posttrain import output
from remit_megatron.posttrain.contract import (
    METRICS,
    MODEL,
    SPEC,
    WORK,
    Manifest,
    as_json,
    checksum_folder,
    last_figures,
    model_identity,
    read_metrics,
    write_manifest,
)
from remit_megatron.posttrain.stage import Stopwatch

CONVERTED = ".converted"
LET_GO_S = 20.0
"""How long ranks that outlive a killed wheel for a moment may hold the run's folder."""


def prepare_mid(node: Node, plan: Plan, parents: dict[str, str]) -> None:
    """stage.json, recipe.toml and work/. parents: role to identity.

    Raises UserError where the data are others by now.
    """
    recipe = recipe_of(node, plan)
    for source in recipe.data.train:
        if quick_verify(source.path).fingerprint != node.parts["data"][source.path]:
            raise UserError(f"{node.name}: {source.path}: its content has changed since the wheel was started")
    request: dict[str, Any] = {"format": 1, "name": node.folder.name, "kind": MID, "parents": parents}
    request |= {"settings": node.parts["settings"], "data": node.parts["data"]}
    write_atomically(node.folder / SPEC, (json.dumps(request, indent=1) + "\n").encode())
    write_atomically(node.folder / "recipe.toml", dump_toml(recipe).encode())
    work = node.folder / WORK
    with writing(work):
        work.mkdir(exist_ok=True)
    share_conversions(node)


def share_conversions(node: Node) -> None:
    """`remit` looks for converted models beside a run's folder, which is in work/: all stages have one place."""
    work, wheel = node.folder / WORK, node.folder.parent.parent
    with writing(work):
        (wheel / CONVERTED).mkdir(exist_ok=True)
        if not (work / CONVERTED).is_symlink():
            (work / CONVERTED).symlink_to(Path(*[".."] * 3, CONVERTED))


def recipe_of(node: Node, plan: Plan) -> Recipe:
    """The stage's recipe, with the run's folder in the stage's."""
    run = node.folder / WORK / "run"
    return parse_recipe({**node.request, "run": str(run)}, f"mid.recipe {plan.wheel.mid.recipe}")


def run_mid(node: Node, plan: Plan, parents: dict[str, str]) -> None:
    """Train, export, check, and write the manifest; or go on with it. Raises what the commands' exit codes mean."""
    prepare_mid(node, plan, parents)
    work = node.folder / WORK
    with Stopwatch(work / "seconds") as clock:
        if not (work / "run" / "DONE").exists():
            _await_lock(node)
            line = ["train", str(node.folder / "recipe.toml")]
            remit([*line, "--nproc", str(plan.wheel.mid.nproc)], node.folder / LOG, node.name)
        _export(node, plan)
        files = checksum_folder(node.folder / MODEL)
        lines = read_metrics(work / "run")
        write_atomically(node.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
        manifest = Manifest(
            name=node.folder.name,
            kind=MID,
            identity=model_identity(files),
            files=as_json(files),
            parents=parents,
            seconds=round(clock.read(), 1),
            steps=max((line["step"] for line in lines), default=0),
            last=last_figures(lines),
        )
    write_manifest(node.folder, manifest)


def _export(node: Node, plan: Plan) -> None:
    """Put the last checkpoint into model/, in the base's type, with the base's tokenizer files."""
    out, base = node.folder / WORK / "out", plan.base.path
    if not out.is_dir() and not (node.folder / MODEL).is_dir():
        dtypes = {str(dtype).removeprefix("torch.") for dtype in HFFolder(base).dtypes()}
        names = {"float32": "fp32", "bfloat16": "bf16"}
        if len(dtypes) > 1 or not dtypes <= names.keys():
            raise UserError(f"base: {base} has weights of {', '.join(sorted(dtypes))}: float32 or bfloat16 is expected")
        line = ["convert", "export", str(node.folder / WORK / "run"), str(out), "--like", str(base)]
        remit([*line, "--dtype", names[dtypes.pop()]], node.folder / LOG, node.name)
    output.accept(out, node.folder / MODEL, base)


def _await_lock(node: Node) -> None:
    lock = node.folder / WORK / "run" / ".lock"
    deadline = time.monotonic() + LET_GO_S
    while lock.exists() and is_held(lock) and time.monotonic() < deadline:
        time.sleep(0.2)
