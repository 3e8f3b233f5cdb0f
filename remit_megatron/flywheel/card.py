"""The model card, README.md in a model's folder: what it was made from and how, its figures, the command.

It is no part of the model's identity, and it is written again when another benchmark of the model is done.
"""

import json
import re
from pathlib import Path
from typing import Any

from remit_megatron import __version__, toml
from remit_megatron.data.files import locked, write_atomically
from remit_megatron.flywheel.graph import BENCHMARK, MID, Node, Plan
from remit_megatron.flywheel.state import Record, finished
from remit_megatron.hf.config import read_json
from remit_megatron.posttrain.contract import CARD, MODEL, Manifest, read_manifest

KINDS = {MID: "mid-trained", "sft": "fine-tuned (SFT)", "dpo": "preference-tuned (DPO)", "rl": "RL-tuned (RLVR)"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(node: Node, plan: Plan) -> None:
    """Of a finished stage's model; of a benchmark, of the model that it is of, where the wheel made it."""
    if node.kind == BENCHMARK:
        model = node.parents["model"].node
        if model is not None:
            write_card(model, plan)
        return
    path = node.folder / MODEL / CARD
    with locked(node.folder / ".card.lock"):  # benchmarks of one model may end at one time
        text = card(node, plan).encode()
        if not path.exists() or path.read_bytes() != text:
            write_atomically(path, text)


def card(node: Node, plan: Plan) -> str:
    """Markdown with the hub's front matter."""
    manifest = finished(node)
    parents = [
        f"| {role} | {source.name} | `{manifest.parents[role]}` | `{_relative(source.path, plan)}` |"
        for role, source in node.parents.items()
    ]
    data = [f"| `{path}` | `{sha[:16]}` |" for path, sha in node.parts["data"].items()]
    settings = {key: value for key, value in node.parts["settings"].items() if value not in (None, {}, [])}
    return "\n".join(
        [
            *_front_matter(plan),
            "",
            f"# {', '.join(node.names)}",
            "",
            f"A {KINDS[node.kind]} model of a flywheel: {_sentence(node, plan)}",
            "",
            "| made from | | identity | folder |",
            "|---|---|---|---|",
            *parents,
            "",
            "| data | SHA-256 |",
            "|---|---|",
            *data,
            "",
            f"Identity `{manifest.identity}`, key `{node.key}`, {manifest.steps:,} steps.",
            "",
            "## Figures",
            "",
            "| figure | value |",
            "|---|---|",
            *_figures(manifest),
            *_benchmarks(node, plan),
            "",
            "## Settings",
            "",
            "```toml",
            toml.dumps(_without_none(settings)).strip(),
            "```",
            "",
            "## Made by",
            "",
            "```bash",
            f"remit flywheel run {Record(plan.wheel.folder).file() or 'WHEEL.toml'} --until {node.name}",
            "```",
            "",
            f"remit-megatron {__version__}"
            + "".join(f", {name} {version}" for name, version in sorted(manifest.versions.items())),
            "",
        ]
    )


def _front_matter(plan: Plan) -> list[str]:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    base = read_json(plan.base.path / "config.json").get("_name_or_path")
    if isinstance(base, str) and HUB_NAME.fullmatch(base):
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    license_of_base = _license(plan.base.path / CARD)
    lines += [f"license: {license_of_base}"] if license_of_base else []
    return ["---", *lines, "tags:", "- remit", "- mid-training", "---"]


def _license(path: Path) -> str | None:
    try:
        front = path.read_text(encoding="utf-8").split("---")[1]
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    found = re.search(r"^license: *(\S+)$", front, re.MULTILINE)
    return found[1] if found else None


def _sentence(node: Node, plan: Plan) -> str:
    if node.kind != MID:
        return f"{node.kind.upper()} of {node.parents['model'].name}."
    objective = node.parts["settings"]["objective"]["name"]
    guided = f", guided by {node.parents['reference'].name}" if "reference" in node.parents else ""
    return f"mid-training of {node.parents['model'].name} with the objective {objective}{guided}."


def _figures(manifest: Manifest) -> list[str]:
    return [f"| {name}, last step | {value:.6g} |" for name, value in sorted(manifest.last.items())]


def _benchmarks(node: Node, plan: Plan) -> list[str]:
    lines = []
    for other in plan.nodes:
        if other.kind == BENCHMARK and other.parents["model"].node is node:
            manifest = read_manifest(other.folder)
            if manifest is not None:
                label = other.name.removeprefix(node.name).lstrip("-")
                lines += [f"| {label}: {name} | {value:.6g} |" for name, value in manifest.last.items()]
    return lines


def _relative(path: Path, plan: Plan) -> str:
    root = plan.wheel.folder.absolute()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return json.loads(json.dumps(value)) if isinstance(value, tuple) else value
