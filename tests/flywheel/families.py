"""Models of families round the wheel, for the price of one import: `python -m tests.flywheel.families FOLDER NAME...`.

The wheel's own processes are forked from this one in place of started anew. Prints, as JSON, what was found of each.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import remit_megatron.convert.exporter
import remit_megatron.flywheel.mid
import remit_megatron.train.loop
from remit_megatron import toml
from remit_megatron.benchmark.model import find_model, weights_folder
from remit_megatron.cli import main
from remit_megatron.data.tokenizer import tokenizer_hash
from remit_megatron.flywheel.config import load_wheel
from remit_megatron.flywheel.run import run_wheel
from tests.flywheel import wheels

UNTIL = "r1-remit-mid"
WORDS = [7, 3, 19, 4]


def forked(arguments: list[str], log: Path, what: str) -> None:
    """A command of `remit` in a process of its own; one rank is the process itself."""
    if arguments[0] == "train":
        assert arguments[2:] == ["--nproc", "1"]
        arguments = arguments[:2]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("ab") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            code = main(arguments)
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, f"{what}: {log.read_text()}"


def write_wheel(root: Path, family: str) -> Path:
    content = wheels.settings(root)
    content["rl"] |= {"steps": 4}
    base = wheels.make_base(root / family, case=family)
    path = root / f"{family}.toml"
    path.write_text(toml.dumps(content | {"base": str(base), "wheel": str(root / f"wheel of {family}")}))
    return path


def go_round(root: Path, family: str) -> dict[str, Any]:
    file = write_wheel(root, family)
    run_wheel(file, load_wheel(file), UNTIL)
    nodes = wheels.nodes(file)
    folder = nodes["r0-rl"].folder / "model"
    guided = [json.loads(line) for line in (nodes[UNTIL].folder / "metrics.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([WORDS])
    with torch.no_grad():
        logp = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    found = find_model(str(folder), None, chat=True)
    harness = HFLM(pretrained=str(weights_folder(found, root / "out")), device="cpu", batch_size=1)
    text = [f"w{word}" for word in WORDS]
    request = Instance("loglikelihood", {}, (text[0], " " + " ".join(text[1:])), 0)
    ((lm_eval, _),) = harness.loglikelihood([request], disable_tqdm=True)
    folders = [root / family, *(nodes[name].folder / "model" for name in ("r0-mid", "r0-sft", "r0-rl", UNTIL))]
    return {
        "states": {name: state.word for name, state in wheels.states(file).items()},
        "ref_nll": [line["ref_nll"] for line in guided],
        "architecture": type(model).__name__,
        "transformers": logp.sum().item(),
        "lm_eval": lm_eval,
        "tokenizers": sorted({tokenizer_hash(path) for path in folders}),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    remit_megatron.flywheel.mid.remit = forked
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    wheels.make_files(folder)
    print(json.dumps({family: go_round(folder, family) for family in names}))
