"""A stage of kind `sft` by open-instruct, whose clone is at $OPEN_INSTRUCT:

engine = { name = "command", command = ["python", "examples/engines/open_instruct_sft.py", "{stage}"] }

Run it with an interpreter that has open-instruct, with this package's folder on PYTHONPATH: finetune.py cuts rows that
are too long and says nothing, so all rows are checked by this package first. It trains bfloat16 weights.
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
    schedule = sft["schedule"]
    if schedule == "constant" and sft["warmup_share"]:
        schedule = "constant_with_warmup"
    mixture = [part for file in spec["data"] for part in (str(Path(file["path"]).absolute()), "1.0")]
    named = {
        "model_name_or_path": work / "in",
        "tokenizer_name_or_path": work / "in",
        "max_seq_length": sft["max_tokens"],
        "per_device_train_batch_size": sft["microbatch_samples"],
        "gradient_accumulation_steps": sft["batch_samples"] // (sft["microbatch_samples"] * GPUS),
        "learning_rate": sft["peak_lr"],
        "lr_scheduler_type": schedule,
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


def refusal(spec: dict[str, Any], given: Path) -> str | None:
    """What finetune.py would not do, or would do in silence. given: the folder that the stage starts from."""
    sft = spec["sft"]
    if spec["keep"]:
        return "finetune.py keeps no Hugging Face folders on its way: leave out `keep`"
    if sft["min_lr_share"]:
        return "finetune.py's cosine ends at 0: leave out sft.min_lr_share"
    if sft["too_long"] != "refuse":
        return "finetune.py cuts rows that are too long: leave sft.too_long at 'refuse'"
    if sft["batch_samples"] % (sft["microbatch_samples"] * GPUS):
        return f"sft.batch_samples is no multiple of sft.microbatch_samples x {GPUS} GPUs"
    if not all(file["path"].endswith((".jsonl", ".parquet")) for file in spec["data"]):
        return "finetune.py reads .jsonl and .parquet: unpack the data"
    config = json.loads((given / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype != "bfloat16":
        return f"finetune.py trains bfloat16 weights, and the model's are {dtype}"
    tokenizer = json.loads((given / "tokenizer_config.json").read_text())
    pad, end = (_text(tokenizer.get(name)) for name in ("pad_token", "eos_token"))
    if pad in (None, end):
        return (
            "finetune.py would add a token <pad>: name one that the tokenizer has, and that ends no turn, as pad_token "
            "in the base's tokenizer_config.json"
        )
    return None


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def main(stage: Path) -> int:
    from remit_megatron.errors import UserError
    from remit_megatron.posttrain.contract import read_spec
    from remit_megatron.posttrain.prepare import prepare

    spec = json.loads((stage / "stage.json").read_text())
    clone, work = Path(os.environ["OPEN_INSTRUCT"]), stage / "work"
    wrong = refusal(spec, work / "in")
    try:
        prepare(read_spec(stage), work / "in")
    except UserError as error:
        wrong = wrong or str(error)
    if wrong:
        print(wrong, file=sys.stderr)  # the log's last line is the message
        return UserError.exit_code
    line = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "bf16"]
    line += ["--num_processes", str(GPUS), str(clone / "open_instruct/finetune.py"), *arguments(spec, stage)]
    code = subprocess.run(line, cwd=clone).returncode
    if code == 0:
        shutil.rmtree(work / "out", ignore_errors=True)
        shutil.copytree(work / "open_instruct", work / "out", ignore=shutil.ignore_patterns("epoch_*", "step_*"))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
