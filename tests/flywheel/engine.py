"""An engine that is not TRL, in the contract of docs/posttraining.md: engine.py STAGE [MISTAKE].

Each step adds noise, drawn from the seed, the data and the step, to every tensor; it saves every few steps.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

folder, mistake = Path(sys.argv[1]), (*sys.argv[2:], "")[0]
spec = json.loads((folder / "stage.json").read_text())
work, given, settings = folder / "work", folder / "work" / "in", spec[spec["kind"]]
steps, seed = settings.get("steps", 6), int(spec["data"][0]["sha256"][:8], 16) + spec["seed"]


def save(target: Path, weights: dict[str, np.ndarray], step: int) -> None:
    """By rename, so that a checkpoint is whole or absent."""
    shutil.rmtree(work / "part", ignore_errors=True)
    shutil.copytree(given, work / "part", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, work / "part" / "model.safetensors", metadata={"step": str(step)})
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    (work / "part").rename(target)


saved = sorted(work.glob("checkpoint-*"))
done = int(saved[-1].name.split("-")[1]) if saved else 0
sources = [saved[-1] / "model.safetensors"] if saved else sorted(given.glob("*.safetensors"))
weights = {name: value for source in sources for name, value in load_file(source).items()}
lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:done] if saved else []
with (folder / "metrics.jsonl").open("w") as metrics:
    metrics.writelines(lines)
    for step in range(done + 1, steps + 1):
        draw = np.random.default_rng([seed, step])
        weights = {k: v + draw.normal(0, 1e-3, v.shape).astype(v.dtype) for k, v in weights.items()}
        metrics.write(json.dumps({"step": step, "steps": steps, "loss": 1 / step, "correct": step / steps}) + "\n")
        metrics.flush()
        time.sleep(0.05)
        for share in spec["keep"]:
            if step == round(share * steps):
                save(work / "keep" / f"{round(share * 100):03d}", weights, step)
        if step % settings["save_every_steps"] == 0:
            save(work / f"checkpoint-{step:05d}", weights, step)
if mistake == "nan":
    weights["model.norm.weight"][0] = np.nan
if mistake == "rows":
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]
if mistake == "full":
    sys.exit("remit: work: cannot be written: No space left on device: free space there")
save(work / "out", weights, steps)
