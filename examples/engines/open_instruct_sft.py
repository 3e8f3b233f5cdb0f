"""A stage of kind `sft` by open-instruct, whose clone is at $OPEN_INSTRUCT:

engine = { name = "command", command = ["python", "examples/engines/open_instruct_sft.py", "{stage}"] }
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

GPUS = int(os.environ.get("GPUS_PER_NODE", "8"))


def arguments(spec: dict[str, Any], stage: Path) -> list[str]:
    """Of open_instruct/finetune.py."""
    sft, work = spec["sft"], stage / "work"
    if spec["keep"]:
        sys.exit("finetune.py keeps no Hugging Face folders on its way: leave out `keep`")
    mixture = [part for file in spec["data"] for part in (str(Path(file["path"]).absolute()), "1.0")]
    named = {
        "model_name_or_path": work / "in",
        "tokenizer_name_or_path": work / "in",
        "max_seq_length": sft["max_tokens"],
        "per_device_train_batch_size": sft["microbatch_samples"],
        "gradient_accumulation_steps": sft["batch_samples"] // (sft["microbatch_samples"] * GPUS),
        "learning_rate": sft["peak_lr"],
        "lr_scheduler_type": sft["schedule"],
        "warmup_ratio": sft["warmup_share"],
        "weight_decay": sft["weight_decay"],
        "clip_grad_norm": sft["clip_norm"],
        "num_train_epochs": sft["epochs"],
        "packing": sft["packing"],
        "gradient_checkpointing": sft["recompute"],
        "seed": spec["seed"],
        "output_dir": work / "open_instruct",
        "do_not_randomize_output_dir": True,
        "checkpointing_steps": sft["save_every_steps"],
        "logging_steps": 1,
        "push_to_hub": False,
        "try_launch_beaker_eval_jobs": False,
        "try_auto_save_to_beaker": False,
        "dataset_local_cache_dir": work / "cache",
    }
    return [
        *(part for name, value in named.items() for part in (f"--{name}", str(value))),
        "--dataset_mixer_list", *mixture,
    ]  # fmt: skip


def main(stage: Path) -> int:
    spec = json.loads((stage / "stage.json").read_text())
    clone, work = Path(os.environ["OPEN_INSTRUCT"]), stage / "work"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "bf16"]
    line += ["--num_processes", str(GPUS), str(clone / "open_instruct/finetune.py"), *arguments(spec, stage)]
    code = subprocess.run(line, cwd=clone).returncode
    if code == 0:
        shutil.rmtree(work / "out", ignore_errors=True)
        shutil.copytree(work / "open_instruct", work / "out", ignore=shutil.ignore_patterns("epoch_*", "step_*"))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
