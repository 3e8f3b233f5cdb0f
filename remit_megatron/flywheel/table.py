"""`remit flywheel status`: a line a stage."""

from remit_megatron.flywheel.content import Contents
from remit_megatron.flywheel.graph import BENCHMARK, Node, Plan
from remit_megatron.flywheel.run import OLD
from remit_megatron.flywheel.state import DONE, State, assess
from remit_megatron.posttrain.contract import read_manifest

HEAD = ("stage", "state", "key", "from", "time", "")
SHOWN = ("loss", "nll", "correct")
"""Figures of a finished stage's last step that the table has, where they are there."""


def table(plan: Plan, contents: Contents) -> str:
    """Stage, state, key, parents, time, and why or how it went."""
    states = assess(plan, contents)
    rows = [_row(node, states[node.folder]) for node in plan.nodes]
    widths = [max(len(row[i]) for row in (HEAD, *rows)) for i in range(len(HEAD) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in
             (HEAD, *rows)]  # fmt: skip
    counts = [state.word for state in states.values()]
    summary = f"{counts.count(DONE)} of {len(counts)} stages are done"
    return "\n".join([*lines, "", summary, *_left_over(plan)])


def _row(node: Node, state: State) -> tuple[str, ...]:
    manifest = read_manifest(node.folder)
    why, time = state.why, ""
    if manifest is not None:
        time = _duration(manifest.seconds)
        if state.word == DONE:
            names = list(manifest.last)[:4] if node.kind == BENCHMARK else [n for n in SHOWN if n in manifest.last]
            why = "  ".join(f"{name} {manifest.last[name]:.4g}" for name in names)
    parents = ", ".join(source.name for source in node.parents.values())
    return (", ".join(node.names), state.word, node.key, parents, time, why)


def _left_over(plan: Plan) -> list[str]:
    """Folders that no stage of the file has any more."""
    stages = plan.wheel.folder / "stages"
    ours = {node.folder.name for node in plan.nodes}
    there = [p for p in stages.iterdir() if p.is_dir() and p.name not in ours] if stages.is_dir() else []
    old = plan.wheel.folder / OLD
    lines = []
    if there:
        names = ", ".join(sorted(path.name for path in there))
        lines.append(f"no stage of this file, kept for when it is one again: {names}")
    if old.is_dir() and any(old.iterdir()):
        lines.append(f"made from other models, may be removed: {old}")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
