"""A stage of kind `rl` by verl (0.9):

engine = { name = "command", command = ["python", "examples/engines/verl_rl.py", "{stage}"] }

Run it with an interpreter that has verl, with this package's folder on PYTHONPATH: rewards are its verifiers. They see
a completion's text and not whether it ended, so the stage has to say `rl.must_stop = false`.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

GPUS = int(os.environ.get("GPUS_PER_NODE", "8"))
NODES = int(os.environ.get("NODES", "1"))


def refuse(mistake: str) -> NoReturn:
    """The user's: exit code 2, and the last line of the log says it."""
    print(mistake, file=sys.stderr)
    sys.exit(2)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **more: Any) -> float:
    """What verl calls for each completion; data_source is the verifier's name."""
    from remit_megatron.posttrain.verifiers import find

    return find(data_source, "verl", allow_code=False).score(solution_str, json.loads(ground_truth))


def write_parquet(spec: dict[str, Any], path: Path) -> None:
    """The stage's rows in verl's columns."""
    import pyarrow
    from pyarrow import parquet

    from remit_megatron.posttrain import data

    rows: list[dict[str, Any]] = []
    for file in spec["data"]:
        for where, row in data.read_rows(file["path"]):
            found = data.problem(where, row, spec["rl"]["verifier"])
            if isinstance(found.prompt, str):
                refuse(f"{where}: verl takes messages as a prompt, and this one is text")
            rows.append(
                {
                    "data_source": found.verifier,
                    "prompt": found.prompt,
                    "ability": "verifiable",
                    "reward_model": {"style": "rule", "ground_truth": json.dumps(found.ground_truth)},
                    "extra_info": {"index": len(rows)},
                }
            )
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def keep_steps(spec: dict[str, Any]) -> dict[str, int]:
    """Folder below keep/ to its step."""
    return {f"{round(100 * s):03d}": max(1, round(s * spec["rl"]["steps"])) for s in spec["keep"]}


def overrides(spec: dict[str, Any], stage: Path) -> dict[str, Any]:
    """verl's settings for a stage."""
    rl, work = spec["rl"], stage / "work"
    if rl["schedule"] == "linear":
        refuse("verl has the schedules constant and cosine: set rl.schedule to one of them")
    if rl["must_stop"]:
        refuse("verl's rewards do not see whether a completion ended: set rl.must_stop = false")
    prompts = rl["batch_samples"] // rl["completions"]
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": rl["loss"] != "dr_grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_files": work / "train.parquet",
        "data.val_files": work / "train.parquet",
        "data.train_batch_size": prompts,
        "data.max_prompt_length": rl["max_prompt_tokens"],
        "data.max_response_length": rl["max_completion_tokens"],
        "data.filter_overlong_prompts": rl["too_long"] == "drop",
        "data.truncation": "error",
        "data.seed": spec["seed"],
        "actor_rollout_ref.model.path": work / "in",
        "actor_rollout_ref.model.enable_gradient_checkpointing": rl["recompute"],
        "actor_rollout_ref.actor.optim.lr": rl["peak_lr"],
        "actor_rollout_ref.actor.optim.lr_scheduler_type": rl["schedule"],
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": rl["warmup_share"],
        "actor_rollout_ref.actor.optim.min_lr_ratio": rl["min_lr_share"],
        "actor_rollout_ref.actor.optim.weight_decay": rl["weight_decay"],
        "actor_rollout_ref.actor.optim.clip_grad": rl["clip_norm"],  # actor.grad_clip reaches no engine
        "actor_rollout_ref.actor.ppo_mini_batch_size": prompts,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": rl["microbatch_samples"],
        "actor_rollout_ref.actor.use_kl_loss": rl["kl"] > 0,
        "actor_rollout_ref.actor.kl_loss_coef": rl["kl"],
        "actor_rollout_ref.actor.loss_agg_mode": {
            "grpo": "seq-mean-token-mean",
            "dapo": "token-mean",
            "dr_grpo": "seq-mean-token-sum-norm",
        }[rl["loss"]],
        # Without hf_model the folder actor/huggingface holds no weights.
        "actor_rollout_ref.actor.checkpoint.save_contents": "[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": rl["completions"],
        "actor_rollout_ref.rollout.seed": spec["seed"],
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,  # verl's default is 2
        "actor_rollout_ref.rollout.temperature": rl["temperature"],
        "actor_rollout_ref.rollout.gpu_memory_utilization": rl["vllm_memory_share"],
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": rl["microbatch_samples"],
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": rl["microbatch_samples"],
        "reward.custom_reward_function.path": Path(__file__).resolve(),
        "reward.custom_reward_function.name": "compute_score",
        "trainer.logger": "[console,file]",
        "trainer.n_gpus_per_node": GPUS,
        "trainer.nnodes": NODES,
        "trainer.total_epochs": 1_000_000,  # total_training_steps ends it
        "trainer.total_training_steps": rl["steps"],
        "trainer.save_freq": math.gcd(rl["save_every_steps"], *keep_steps(spec).values()),
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": work / "verl",
    }


def copy_metrics(logs: list[Path], stage: Path, steps: int) -> None:
    """verl's own lines, {"step", "data"}, as the stage's; a step that was done twice counts as it was done last.

    logs: of each start, in order; a kill may have torn a last line.
    """
    texts = [log.read_text() for log in logs]
    lines = [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]
    by_step = {line["step"]: {k: v for k, v in line["data"].items() if isinstance(v, int | float)} for line in lines}
    text = [json.dumps({**by_step[step], "step": step, "steps": steps}) for step in sorted(by_step)]
    (stage / "metrics.jsonl").write_text("".join(f"{line}\n" for line in text))


def main(stage: Path) -> int:
    spec = json.loads((stage / "stage.json").read_text())
    work = stage / "work"
    write_parquet(spec, work / "train.parquet")
    line = [sys.executable, "-m", "verl.trainer.main_ppo"]
    line += [f"{key}={value}" for key, value in overrides(spec, stage).items()]
    before = sorted(work.glob("verl-*.jsonl"))
    log = work / f"verl-{len(before):03d}.jsonl"  # a start of verl empties the file that it is given
    code = subprocess.run(line, env={**os.environ, "VERL_FILE_LOGGER_PATH": str(log)}).returncode
    if code:
        return code
    steps = spec["rl"]["steps"]
    copy_metrics([*before, log], stage, steps)
    for target, step in {**{f"keep/{name}": s for name, s in keep_steps(spec).items()}, "out": steps}.items():
        shutil.rmtree(work / target, ignore_errors=True)
        shutil.copytree(work / f"verl/global_step_{step}/actor/huggingface", work / target)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
