"""The wheel's stages and what each is made from, known before anything runs.

A stage's key is a hash of its settings, of the content of its data and recipe, and of its parents' keys. It names the
stage's folder, so two arms share the stages whose keys are equal, and a changed setting or datum gives another folder
to what depends on it and to nothing else.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron import toml
from remit_megatron.config import parse_recipe
from remit_megatron.convert.pair import check_pair
from remit_megatron.data.manifest import quick_verify
from remit_megatron.data.tokenizer import deciding, tokenizer_hash
from remit_megatron.errors import UserError
from remit_megatron.flywheel.config import STAGES, Arm, Benchmark, Stage, Wheel
from remit_megatron.flywheel.content import Contents, digest
from remit_megatron.posttrain.contract import KEEP, MODEL, DataFile, StageSpec, keep_name
from remit_megatron.sections import without_later

NTP = Arm(objective={"name": "ntp"})
MID, BENCHMARK = "mid", "benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that a stage is made from."""

    name: str
    """For people: base, given rl, or a stage's name."""
    path: Path
    key: str
    """Of the stage that makes it; of a model that was there before, its identity."""
    node: "Node | None" = None
    kept: str | None = None
    """Folder below keep/; None: the stage's result."""


@dataclass(slots=True, kw_only=True)
class Node:
    """A stage of the wheel."""

    kind: str
    """mid, sft, dpo, rl or benchmark."""
    key: str
    parts: dict[str, Any]
    """What the key is made of: kind, settings, data, parents."""
    folder: Path
    parents: dict[str, Source]
    """model, and of guided mid-training, and of a KL, reference."""
    request: Any
    """A recipe's settings, a StageSpec without identities of parents, or a Benchmark."""
    names: list[str] = field(default_factory=list)
    """Round, arm and kind; several where arms share it."""

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(slots=True)
class Plan:
    """All stages, parents before children."""

    wheel: Wheel
    base: Source
    nodes: list[Node] = field(default_factory=list)

    def by_name(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.names}

    def add(self, name: str, node: Node) -> Node:
        """The node, or the one of the same key that is there already, with one name more."""
        node = next((known for known in self.nodes if known.folder == node.folder), node)
        if not node.names:
            self.nodes.append(node)
        if name not in node.names:
            node.names.append(name)
        return node

    def needed_for(self, name: str) -> list[Node]:
        """A stage, all that it is made from, and the benchmarks of these, in order.

        Raises UserError for an unknown name.
        """
        known = self.by_name()
        if name not in known:
            raise UserError(f"--until {name}: no such stage: {', '.join(known)}")
        wanted, queue = {known[name].folder}, [known[name]]
        while queue:
            parents = [source.node for source in queue.pop().parents.values() if source.node]
            wanted |= {node.folder for node in parents}
            queue += parents
        return [node for node in self.nodes if node.folder in wanted or _measures(node, wanted)]


def _measures(node: Node, folders: set[Path]) -> bool:
    """Whether it is a benchmark of one of the stages, or of a model that was there before."""
    nodes = (source.node for source in node.parents.values())
    return node.kind == BENCHMARK and all(one is None or one.folder in folders for one in nodes)


def make_plan(wheel: Wheel, contents: Contents) -> Plan:
    """Read all that the keys are made of. Raises UserError naming the file or key that is wrong."""
    path = Path(wheel.base).absolute()
    plan = Plan(wheel, Source(name="base", path=path, key=contents.model(path, "base")))
    builder = _Builder(plan, wheel, contents)
    builder.benchmarks("base", "base", plan.base)
    first = builder.given() if wheel.given else builder.chain("r0", NTP, plan.base, None)
    previous = {name: first for name in wheel.arms}
    for number in range(1, wheel.rounds + 1):
        for name, arm in wheel.arms.items():
            if number <= (arm.rounds or wheel.rounds):
                before = previous[name]
                start = before.get(MID, plan.base) if wheel.start == "previous" and number > 1 else plan.base
                wanted = wheel.reference_of(arm)
                previous[name] = builder.chain(f"r{number}-{name}", arm, start, before[wanted] if wanted else None)
    builder.divergences(first)
    return plan


class _Builder:
    def __init__(self, plan: Plan, wheel: Wheel, contents: Contents):
        self.plan, self.wheel, self.contents = plan, wheel, contents
        self.root = wheel.folder.absolute() / "stages"

    def given(self) -> dict[str, Source]:
        found = {}
        for name, text in self.wheel.given.items():
            path = Path(text).absolute()
            wrong = check_pair(self.plan.base.path, path).wrong
            if wrong:
                raise UserError(f"given.{name}: {path} does not do as a reference for the base: {wrong[0]}")
            found[name] = Source(name=f"given {name}", path=path, key=self.contents.model(path, f"given.{name}"))
        return found

    def chain(self, name: str, arm: Arm, start: Source, reference: Source | None) -> dict[str, Source]:
        """Mid-training and post-training of one round of one arm; the models by stage, kept ones as rl@0.1."""
        parents = {"model": start} | ({"reference": reference} if reference else {})
        models = {MID: self._add(f"{name}-{MID}", MID, *self._mid(arm, parents), parents)}
        for kind, stage in self.wheel.stages.items():
            parents = {"model": list(models.values())[-1]}
            models[kind] = self._add(f"{name}-{kind}", kind, *self._post(kind, stage, parents["model"]), parents)
        for kind, stage in self.wheel.stages.items():
            node = models[kind].node
            assert node is not None
            for share in stage.keep:
                kept = keep_name(share)
                path, label = node.folder / KEEP / kept, f"{models[kind].name}@{share:g}"
                models[f"{kind}@{share:g}"] = Source(
                    name=label, path=path, key=f"{node.key}/{kept}", node=node, kept=kept
                )
        return models

    def benchmarks(self, name: str, kind: str, model: Source) -> None:
        for label, benchmark in self.wheel.benchmarks.items():
            if kind in benchmark.after and benchmark.kl_to is None:
                files = {one: self.contents.file(Path(one), f"benchmarks.{label}.data") for one in benchmark.data}
                settings = without_later(benchmark, benchmark.model_dump(mode="json", exclude={"after", "data"}))
                self._add(f"{name}-{label}", BENCHMARK, benchmark, settings, files, {"model": model})

    def divergences(self, first: dict[str, Source]) -> None:
        """Benchmarks with `kl_to`, once every model that one can name is known. first: what [given] has, or round 0."""
        models = {
            name: Source(name=node.name, path=node.folder / MODEL, key=node.key, node=node)
            for node in self.plan.nodes
            if node.kind != BENCHMARK
            for name in node.names
        }
        known = {source.name: source for source in first.values() if source.node is None} | models
        for label, benchmark in self.wheel.benchmarks.items():
            if benchmark.kl_to is None:
                continue
            if benchmark.kl_to not in known:
                raise UserError(f"benchmarks.{label}.kl_to = '{benchmark.kl_to}': one of {', '.join(known)} is meant")
            reference = known[benchmark.kl_to]
            compared = {"base": self.plan.base} if "base" in benchmark.after else {}
            compared |= {name: one for name, one in models.items() if one.node and one.node.kind in benchmark.after}
            for name, model in compared.items():
                if model.path != reference.path:
                    parents = {"model": model, "reference": reference}
                    self._add(f"{name}-{label}", BENCHMARK, *self._divergence(label, benchmark, parents), parents)

    def _divergence(
        self, label: str, benchmark: Benchmark, parents: dict[str, Source]
    ) -> tuple[Any, dict[str, Any], dict[str, str]]:
        """The recipe, as of ReMiT with these two models, on whose held-out set they are compared."""
        settings, identity, _ = self._mid(Arm(), parents)
        held_out = list(settings["data"].get("eval", {}).values())[:1]
        if not held_out:
            raise UserError(f"benchmarks.{label}.kl_to: name a held-out set in data.eval of {self.wheel.mid.recipe}")
        kept = {key: value for key, value in identity["data"].items() if key not in ("train", "seed")}
        request = (benchmark, settings, self.wheel.mid.nproc)
        data = {path: quick_verify(path).fingerprint for path in held_out}
        return request, {"kl": kept, "samples": benchmark.samples}, data

    def _add(
        self, name: str, kind: str, request: Any, settings: Any, data: dict[str, str], parents: dict[str, Source]
    ) -> Source:
        keys = {role: source.key for role, source in parents.items()}
        # As JSON gives it back: tuples are lists.
        parts = json.loads(json.dumps({"kind": kind, "settings": settings, "data": data, "parents": keys}))
        # Where a file lies does not count, only its content and place.
        key = digest({**parts, "data": list(data.values())})
        folder = self.root / f"{kind}-{key}"
        node = Node(kind=kind, key=key, parts=parts, folder=folder, parents=parents, request=request)
        node = self.plan.add(name, node)
        model = Source(name=node.name, path=folder / MODEL, key=key, node=node)
        if kind != BENCHMARK:
            self.benchmarks(name, kind, model)
        return model

    def _mid(self, arm: Arm, parents: dict[str, Source]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        mid = self.wheel.mid
        settings = toml.read(Path(mid.recipe), "recipe")
        for key, value in (mid.set | arm.set).items():
            toml.override(settings, f"{key}={toml.dump_value(value)}")
        settings |= {"run": "run", "objective": dict(arm.objective)}
        settings.setdefault("model", {})["init"] = str(parents["model"].path)
        if "reference" in parents:
            settings.setdefault("reference", {})["path"] = str(parents["reference"].path)
        else:
            settings.pop("reference", None)
        where = f"mid.recipe {mid.recipe}"
        recipe = parse_recipe(settings, where)
        identity = recipe.identity()
        data = {}
        for number, source in enumerate(identity["data"]["train"]):
            data[source.pop("path")] = quick_verify(recipe.data.train[number].path).fingerprint
        if identity["data"].pop("tokenizer") is not None:
            assert recipe.data.tokenizer is not None
            data[recipe.data.tokenizer] = deciding(tokenizer_hash(recipe.data.tokenizer))
        # Which models these are is the parents' business.
        identity["model"].pop("init")
        identity.pop("reference", None)
        return settings, identity, data

    def _post(self, kind: str, stage: Stage, model: Source) -> tuple[StageSpec, dict[str, Any], dict[str, str]]:
        settings = STAGES[kind](**{key: getattr(stage, key) for key in STAGES[kind].model_fields})
        sums = {path: self.contents.file(Path(path), f"{kind}.data") for path in stage.data}
        chat = stage.chat or self.wheel.chat
        request = StageSpec.model_validate(
            {
                "name": kind,
                "kind": kind,
                "model": str(model.path),
                "data": tuple(DataFile(path=str(Path(path).absolute()), sha256=sums[path]) for path in stage.data),
                "seed": stage.seed,
                "keep": stage.keep,
                "engine": stage.engine or self.wheel.engine,
                "chat": chat,
                kind: settings,
                "allow_code_execution": stage.allow_code_execution,
            }
        )
        identity = {k: v for k, v in request.identity().items() if k not in ("name", "model", "data", "parents")}
        if chat.template is not None:
            identity["chat"].pop("template")
            sums[chat.template] = self.contents.file(Path(chat.template), "chat.template")
        return request, identity, sums
