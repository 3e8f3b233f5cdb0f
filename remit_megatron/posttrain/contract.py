"""A stage's folder: what is asked for (`stage.json`), what an engine leaves, and what came of it (`manifest.json`).

    stage.json      the request: a StageSpec; written before anything starts
    work/           the engine's own: checkpoints, logs, and `out/`, the model that it made
    metrics.jsonl   a line a logged step: {"step": 1, "loss": 2.1, ...}
    keep/010/       the model after 10% of the steps, where the request asks for it
    model/          the result, by rename from work/out
    manifest.json   written last: the stage is done

docs/posttraining.md holds the contract for an engine's author.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from remit_megatron import toml
from remit_megatron.data import checksums
from remit_megatron.data.checksums import Checksum
from remit_megatron.data.files import make_folder, write_atomically
from remit_megatron.errors import DamagedError, UserError
from remit_megatron.sections import NonNegative, Positive, Section, without_later

SPEC, MANIFEST, METRICS = "stage.json", "manifest.json", "metrics.jsonl"
MODEL, WORK, KEEP = "model", "work", "keep"
CARD = "README.md"
"""For people: a model card may be added to a finished model, and is no part of what it is."""
Kind = Literal["sft", "dpo", "rl"]
KINDS: tuple[Kind, ...] = ("sft", "dpo", "rl")


class Engine(Section):
    name: Literal["trl", "command"] = "trl"
    python: str | None = None
    """Of `trl`: another interpreter that has it; none: this one. Decides no figure, so it may change at a resume."""
    launch: tuple[str, ...] = ()
    """Of `trl`: what stands between the interpreter and the program, such as ["-m", "torch.distributed.run",
    "--nproc-per-node", "8"] or ["-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]."""
    command: tuple[str, ...] = ()
    """Of `command`: a command line; `{stage}` in it is the stage's folder."""

    @model_validator(mode="after")
    def _consistent(self) -> "Engine":
        if (self.name == "command") != bool(self.command):
            raise UserError("engine.command is for engine.name = 'command', which needs it")
        if self.name == "command" and (self.python or self.launch):
            raise UserError("engine.python and engine.launch are for engine.name = 'trl': put them into engine.command")
        return self


class Chat(Section):
    """How messages become text. Left out: as the model's own tokenizer files say."""

    template: str | None = None
    """A jinja file."""
    end_of_turn: str | None = None
    """The token that ends an answer, one that the tokenizer has. It becomes the tokenizer's eos_token."""


class Optimizer(Section):
    peak_lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    min_lr_share: float = Field(0.0, ge=0, lt=1)
    """Of `cosine`: where it ends, as a share of peak_lr."""
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """Of the steps."""
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    batch_samples: Positive
    """Samples of an optimizer step over all processes; in RL: completions, a multiple of `completions`."""
    microbatch_samples: Positive = 1
    """Samples that a process holds at a time."""
    save_every_steps: Positive = 100
    """A stopped stage goes on from the newest complete checkpoint in work/."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the computation; weights and moments are kept in float32 in both cases."""
    recompute: bool = False
    """Gradient checkpointing."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Rows that are longer than the limit below: none is ever cut."""

    @model_validator(mode="after")
    def _schedule(self) -> "Optimizer":
        if self.min_lr_share and self.schedule != "cosine":
            raise UserError(f"min_lr_share is for schedule = 'cosine', not '{self.schedule}'")
        return self


class SFT(Optimizer):
    epochs: Positive = 1
    max_tokens: Positive
    """Longest sample; an answer that this would cut away is refused before anything starts."""
    packing: bool = False
    """Several samples in one sequence. Needs an attention that keeps them apart, which a CPU's does not."""


class DPO(Optimizer):
    epochs: Positive = 1
    max_tokens: Positive
    """Of prompt and answer together."""
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "sigmoid_norm", "apo_zero"] = "sigmoid"
    """`sigmoid_norm` divides by the answer's length, as open-instruct's dpo_norm; `apo_zero` is SmolLM3's."""


class RL(Optimizer):
    steps: Positive
    """Optimizer steps: each draws batch_samples completions and learns from them."""
    completions: int = Field(8, ge=2)
    """Of each prompt; the advantage compares them."""
    max_prompt_tokens: Positive
    max_completion_tokens: Positive
    temperature: float = Field(1.0, gt=0)
    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the model that the stage began with."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    verifier: str | None = None
    """For rows without one of their own; docs/posttraining.md lists them."""
    must_stop: bool = True
    """A completion that reaches max_completion_tokens without an end earns nothing."""
    rollouts: Literal["cached", "transformers", "vllm"] = "cached"
    """Who generates: this package's decoder (Llama, OLMo 2; float32, one process), transformers, or vLLM beside the
    trainer."""
    vllm_memory_share: float = Field(0.3, gt=0, lt=1)
    """Of a GPU's memory, for `vllm`."""

    @model_validator(mode="after")
    def _groups(self) -> "RL":
        if self.batch_samples % self.completions:
            raise UserError(f"batch_samples = {self.batch_samples} is no multiple of completions = {self.completions}")
        return self


class DataFile(Section):
    path: str
    """A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file."""
    sha256: str
    """Of the file's bytes."""


class StageSpec(Section):
    """A request, complete: two equal ones give the same model where the engine is deterministic."""

    format: Literal[1] = 1
    name: str = Field(min_length=1)
    kind: Kind
    model: str
    """The Hugging Face folder that the stage starts from."""
    data: tuple[DataFile, ...] = Field(min_length=1)
    seed: NonNegative = 0
    keep: tuple[float, ...] = ()
    """Shares of the steps, each in (0, 1): the model at that point is kept in keep/, by its percentage."""
    parents: dict[str, str] = Field(default_factory=dict)
    """What the stage was made from: a name (such as "model") to an identity. Checked by whoever made the request."""
    engine: Engine = Engine()
    chat: Chat = Chat()
    sft: SFT | None = None
    dpo: DPO | None = None
    rl: RL | None = None
    allow_code_execution: bool = False
    """Whether verifiers may run code that the model wrote, on this machine."""

    @field_validator("keep")
    @classmethod
    def _shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in shares) or len({keep_name(s) for s in shares}) < len(shares):
            raise ValueError("shares between 0 and 1 are expected, each once by its percentage")
        return shares

    @model_validator(mode="after")
    def _one_kind(self) -> "StageSpec":
        for kind in KINDS:
            if (getattr(self, kind) is None) == (kind == self.kind):
                state = "is missing" if kind == self.kind else "does not belong there"
                raise UserError(f"kind = '{self.kind}': section [{kind}] {state}")
        return self

    @property
    def settings(self) -> Any:
        """The section of this kind: SFT, DPO or RL."""
        return getattr(self, self.kind)

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values: content counts where it is known, not the place that it lies in."""
        content = without_later(self, self.model_dump(mode="json"))
        content["engine"].pop("python")
        content["data"] = [file["sha256"] for file in content["data"]]
        if "model" in self.parents:
            content.pop("model")
        return content


def keep_name(share: float) -> str:
    """Folder of a kept model: 0.1 is "010"."""
    return f"{round(share * 100):03d}"


def data_files(paths: Iterable[str | Path]) -> tuple[DataFile, ...]:
    """Data files with their hashes. Reads them whole. Raises UserError for one that cannot be read."""
    found = []
    for path in paths:
        try:
            found.append(DataFile(path=str(path), sha256=checksums.of_file(Path(path)).sha256))
        except OSError as error:
            raise UserError(f"data: {path}: cannot be read: {error.strerror or error}") from None
    return tuple(found)


def write_spec(folder: Path, spec: StageSpec) -> None:
    """Make a stage's folder. Raises UserError where it holds another stage, or something else."""
    if (folder / SPEC).exists():
        known = read_spec(folder).identity()
        different = first_difference(known, spec.identity())
        if different:
            raise UserError(f"{folder} holds another stage ({different}): name another folder, or remove that one")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no stage: name another folder")
    make_folder(folder, "stage")
    write_atomically(folder / SPEC, (json.dumps(spec.model_dump(mode="json"), indent=1) + "\n").encode())


def read_spec(folder: Path) -> StageSpec:
    """Raises UserError naming stage.json and what is wrong with it."""
    path = folder / SPEC
    try:
        return StageSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {toml.first_problem(error, StageSpec)}") from None
    except (OSError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


class Manifest(Section):
    """What a finished stage left."""

    format: Literal[1] = 1
    name: str
    kind: str
    """A stage's, or what else a wheel has: mid, benchmark."""
    identity: str
    """Sixteen hex digits of the bytes of model/."""
    files: dict[str, dict[str, int | str]]
    """Of model/: name to `bytes` and `sha256`."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Folder below keep/ to the identity of the model in it."""
    parents: dict[str, str] = Field(default_factory=dict)
    seconds: float
    """Of all tries together that the stage's folder tells of."""
    steps: NonNegative
    last: dict[str, float] = Field(default_factory=dict)
    """The figures of the last line of metrics.jsonl."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the engine's packages: recorded, and part of no identity."""
    checksum: str = ""
    """SHA-256 of the manifest's own content."""


def model_identity(files: dict[str, Checksum]) -> str:
    """Of a folder's files, by name and content."""
    text = json.dumps([[name, files[name].sha256] for name in sorted(files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum_folder(folder: Path) -> dict[str, Checksum]:
    """Of all files of a model's folder but its card."""
    return checksums.of_files(path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CARD)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.model_dump(mode="json")
    content["checksum"] = checksums.own_checksum(content)
    write_atomically(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest | None:
    """None: the stage is not finished. Reads no model. Raises DamagedError naming the manifest."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(text)
        if manifest.checksum != checksums.own_checksum(json.loads(text)):
            raise ValueError("its own checksum does not match")
    except ValueError as error:  # ValidationError is one
        raise DamagedError(f"{path}: is damaged: {' '.join(str(error).split())[:200]}") from None
    return manifest


def verify(folder: Path) -> Manifest:
    """That a finished stage's model is what it left; reads it whole.

    Raises UserError for an unfinished stage, DamagedError naming the file that is another.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: this stage is not finished")
    files = {name: Checksum(**values) for name, values in manifest.files.items()}  # type: ignore[arg-type]
    wrong = checksums.problems(folder / MODEL, files, content=True)
    added = {path.name for path in (folder / MODEL).glob("*") if path.is_file()} - {*files, CARD}
    wrong += [f"{name} was added" for name in sorted(added)]
    if wrong:
        raise DamagedError(
            f"{folder / MODEL}: is not what stage {manifest.name} left: {'; '.join(wrong)}: remove {folder} to make it "
            "again"
        )
    return manifest


def as_json(files: dict[str, Checksum]) -> dict[str, dict[str, int | str]]:
    return {name: asdict(files[name]) for name in sorted(files)}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a torn last line, as a kill leaves it, is left out."""
    path = folder / METRICS
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def last_figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The finite numbers of the last line, but for its step."""
    last = lines[-1] if lines else {}
    return {
        key: float(value)
        for key, value in last.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def first_difference(one: Any, other: Any, key: str = "") -> str | None:
    """The first key in which two JSON values differ, with both values; None: they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            found = first_difference(one.get(name), other.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if one == other else f"{key} = {one!r} there, {other!r} here"
