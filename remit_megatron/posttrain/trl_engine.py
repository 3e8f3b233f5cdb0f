"""The engine `trl`: one stage by TRL's trainers, in float32 weights, resumable to the bit on one device.

What TRL's own defaults and resume leave open is settled here: only complete checkpoints are resumed from, metrics are
cut at their step, reinforcement learning is one epoch over an order of prompts that is fixed beforehand, and every
optimizer step is a generation of its own, so that no checkpoint falls between a generation and its use.
"""

import gc
import importlib.metadata
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
import trl
from transformers import TrainerCallback

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import StopRequested, UserError
from remit_megatron.hf.folder import HFFolder, write_tensors
from remit_megatron.posttrain.contract import KEEP, METRICS, WORK, StageSpec, keep_name, read_metrics, read_spec
from remit_megatron.posttrain.host import PACKAGES, Stop
from remit_megatron.posttrain.output import VERSIONS
from remit_megatron.posttrain.prepare import Prepared, prepare
from remit_megatron.posttrain.tokens import column
from remit_megatron.posttrain.trl_rl import RLTrainer, reward_function

MAX_SHARD_BYTES = 5_000_000_000
PARTS = (
    ("trainer_state.json",),
    ("scheduler.pt",),
    ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*"),  # one device, FSDP, FSDP sharded, DeepSpeed
    ("rng_state.pth", "rng_state_0.pth"),
)
"""Of a checkpoint: one of each is there, or TRL goes on in silence from a fresh optimizer, or fails for good."""


def run_trl(folder: Path, stop: Stop) -> None:
    """Run the stage in `folder`, leaving work/out. Raises StopRequested with a checkpoint saved."""
    spec = read_spec(folder)
    work = folder / WORK
    logging.getLogger("trl").setLevel(logging.ERROR)
    prepared = prepare(spec, work / "in")
    main = int(os.environ.get("RANK", "0")) == 0
    start = newest_checkpoint(work, remove=main)
    first_step = int(start.name.partition("-")[2]) if start else 0
    if main:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        write_atomically(work / VERSIONS, (json.dumps(versions) + "\n").encode())
        cut_metrics(folder, first_step)
    trainer = _make_trainer(spec, work, prepared)
    callback = StageCallback(folder, spec, trainer, stop)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    step, total = trainer.state.global_step, trainer.state.max_steps
    if step < total:
        raise StopRequested(f"stopped at step {step} of {total}")
    callback.save_model(work / "out")
    del trainer, callback
    gc.collect()  # a worker's next stage finds the memory free


def newest_checkpoint(work: Path, *, remove: bool) -> Path | None:
    """The newest complete checkpoint; remove: what a kill left incomplete, so that TRL never sees it."""
    complete = []
    for path in work.glob("checkpoint-*"):
        if _complete(path):
            complete.append(path)
        elif remove:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _complete(path: Path) -> bool:
    if not all(any(any(path.glob(name)) for name in names) for names in PARTS):
        return False
    try:
        state = json.loads((path / "trainer_state.json").read_text())  # written last
    except ValueError:
        return False
    return path.name == f"checkpoint-{state.get('global_step')}"


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines after a step: they are written again."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())


class StageCallback(TrainerCallback):
    """Writes metrics.jsonl, keeps models at shares of the steps, and stops where the process was asked to."""

    def __init__(self, folder: Path, spec: StageSpec, trainer: Any, stop: Stop):
        self.folder, self.spec, self.trainer, self.stop = folder, spec, trainer, stop
        self.given = HFFolder(folder / WORK / "in")
        self.main = trainer.is_world_process_zero()
        # Of SFT and DPO, TRL counts from zero again when it resumes.
        lines = read_metrics(folder) if spec.kind != "rl" else []
        self.tokens_before = lines[-1].get("num_tokens", 0) if lines else 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if not logs or "train_runtime" in logs or not self.main:
            return
        line: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps}
        names = {"learning_rate": "lr", "rewards/correct_answers/mean": "correct"}
        for key, value in logs.items():
            if isinstance(value, int | float) and not key.startswith("rewards/correct_answers/std"):
                line[names.get(key, key)] = value + (self.tokens_before if key == "num_tokens" else 0)
        with (self.folder / METRICS).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        _check_health(self.spec, line)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for share in self.spec.keep:
            if state.global_step == max(1, round(share * state.max_steps)):
                self.save_model(self.folder / WORK / KEEP / keep_name(share))
        if self._asked() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _asked(self) -> bool:
        """Whether any process was asked to stop: all of them save at one step."""
        asked = torch.tensor(float(self.stop.requested), device=self.trainer.accelerator.device)
        return bool(self.trainer.accelerator.reduce(asked, "sum") > 0)

    def save_model(self, target: Path) -> None:
        """A Hugging Face folder in the types of the model that the stage began with; complete or absent."""
        partial = target.with_name(f".{target.name}.tmp")
        if self.main:
            shutil.rmtree(partial, ignore_errors=True)
        self.trainer.save_model(str(partial))
        self.trainer.accelerator.wait_for_everyone()
        if self.main:
            _restore_types(partial, self.given)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)


def _restore_types(folder: Path, given: HFFolder) -> None:
    """Round the tensors to the types that they had before they became float32 for the training."""
    made = HFFolder(folder)
    types = {name: given.tensors[name].dtype if name in given.tensors else stored.dtype
             for name, stored in made.tensors.items()}  # fmt: skip
    if all(types[name] == stored.dtype for name, stored in made.tensors.items()):
        return
    order = [name for shard in made.shards for name in sorted(n for n, s in made.tensors.items() if s.shard == shard)]
    sizes = {name: int(np.prod(made.tensors[name].shape)) * getattr(torch, types[name]).itemsize for name in order}
    rounded = folder / "rounded"
    rounded.mkdir()
    tensors = {name: tensor for name, tensor in made if name in types}
    converted = ((name, tensors.pop(name).to(getattr(torch, types[name]))) for name in order)
    write_tensors(rounded, converted, sizes, MAX_SHARD_BYTES)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for path in rounded.iterdir():
        path.rename(folder / path.name)
    rounded.rmdir()


def _check_health(spec: StageSpec, line: dict[str, Any]) -> None:
    """Raise UserError where going on would cost time and teach nothing."""
    if line["step"] == 1 and line.get("completions/clipped_ratio") == 1.0:
        raise UserError(
            f"{spec.name}: no completion of the first step ended within rl.max_completion_tokens = "
            f"{spec.settings.max_completion_tokens}: raise it, or see that chat.end_of_turn is what the model was "
            "taught to end an answer with"
        )


def _make_trainer(spec: StageSpec, work: Path, prepared: Prepared) -> Any:
    model = str(work / "in")
    common = _arguments(spec, work)
    arguments: Any
    if spec.sft is not None:
        table = pyarrow.table({"input_ids": column(prepared.ids), "labels": column(prepared.labels)})
        arguments = trl.SFTConfig(
            **common, num_train_epochs=spec.sft.epochs, max_length=spec.sft.max_tokens, packing=spec.sft.packing
        )
        return trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset(table))
    if spec.dpo is not None:
        arguments = trl.DPOConfig(
            **common,
            num_train_epochs=spec.dpo.epochs,
            max_length=spec.dpo.max_tokens,
            beta=spec.dpo.beta,
            loss_type=[spec.dpo.loss],
        )
        return trl.DPOTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(prepared.rows))
    assert spec.rl is not None
    rl = spec.rl
    prompts = rl.batch_samples // rl.completions
    arguments = trl.GRPOConfig(
        **common,
        num_train_epochs=1,
        num_generations=rl.completions,
        steps_per_generation=common["gradient_accumulation_steps"],
        shuffle_dataset=False,
        max_completion_length=rl.max_completion_tokens,
        temperature=rl.temperature,
        beta=rl.kl,
        loss_type=rl.loss,
        scale_rewards="none" if rl.loss == "dr_grpo" else "group",
        use_vllm=rl.rollouts == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=rl.vllm_memory_share,
    )
    order = prompt_order(len(prepared.rows), rl.steps * prompts, spec.seed)
    rows = datasets.Dataset.from_list([prepared.rows[i] for i in order])
    return RLTrainer(model, reward_function(spec, model), args=arguments, train_dataset=rows, rollouts=rl.rollouts)


def prompt_order(rows: int, needed: int, seed: int) -> list[int]:
    """Rows by step: every row once, in an order of its own each time round, until there are enough."""
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(rows) for _ in range(-(-needed // rows))]
    return np.concatenate(rounds)[:needed].tolist()


def _arguments(spec: StageSpec, work: Path) -> dict[str, Any]:
    """What all of TRL's trainers are given. Whatever decides a figure is named, so that no default of TRL's does."""
    settings = spec.settings
    world = int(os.environ.get("WORLD_SIZE", "1"))
    together = settings.microbatch_samples * world
    if settings.batch_samples % together:
        raise UserError(
            f"{spec.kind}.batch_samples = {settings.batch_samples} is no multiple of microbatch_samples = "
            f"{settings.microbatch_samples} x {world} processes"
        )
    cosine = settings.schedule == "cosine"
    return {
        "output_dir": str(work),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings.precision == "bf16",
        "fp16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": settings.recompute,
        "per_device_train_batch_size": settings.microbatch_samples,
        "gradient_accumulation_steps": settings.batch_samples // together,
        "learning_rate": settings.peak_lr,
        "lr_scheduler_type": "cosine_with_min_lr" if cosine else
        {"linear": "linear", "constant": "constant_with_warmup"}[settings.schedule],
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_share} if cosine else {},
        "warmup_steps": settings.warmup_share,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip_norm,
        "optim": "adamw_torch",
        "seed": spec.seed,
        "data_seed": spec.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_every_steps,
        "save_total_limit": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }  # fmt: skip
