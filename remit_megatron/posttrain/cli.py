"""The commands `remit post sft | dpo | rl | data`."""

import argparse
import json
from pathlib import Path
from typing import Any

from remit_megatron.arguments import count, positive
from remit_megatron.errors import UserError

HELP = {"sft": "fine-tune on conversations", "dpo": "learn from preferences", "rl": "learn from verified answers"}


def add_parser(commands: Any) -> None:
    """Add `post` to the subcommands of `remit`."""
    parser = commands.add_parser("post", help="post-training: SFT, DPO, RL with verifiable rewards")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for kind, text in HELP.items():
        one = actions.add_parser(kind, help=text)
        one.add_argument("stage", metavar="STAGE", help="stage file (TOML)")
        one.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one key"
        )
        if kind == "rl":
            one.add_argument(
                "--allow-code-execution", action="store_true", help="verifiers run what the model writes, here"
            )
        one.set_defaults(func=_stage, kind=kind, allow_code_execution=False)
    two = actions.add_parser("data", help="verifiable data from a task of reasoning-gym")
    two.add_argument("task", metavar="TASK", help="such as chain_sum")
    two.add_argument("output", metavar="FOLDER", help="for train.jsonl and test.jsonl")
    two.add_argument("--train", type=positive, required=True, metavar="N")
    two.add_argument("--test", type=positive, required=True, metavar="N")
    two.add_argument("--seed", type=count, default=0)
    two.add_argument("--with", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of the task")
    two.set_defaults(func=_data)


def _stage(arguments: argparse.Namespace) -> int:
    from remit_megatron.posttrain.contract import MODEL, read_manifest, write_spec
    from remit_megatron.posttrain.stage import run_stage
    from remit_megatron.posttrain.stage_file import load_stage

    folder, spec = load_stage(
        arguments.kind, Path(arguments.stage), arguments.overrides, allow_code=arguments.allow_code_execution
    )
    write_spec(folder, spec)
    run_stage(folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    print(f"{folder / MODEL}: {manifest.steps} steps in {manifest.seconds:.0f} s, identity {manifest.identity}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from remit_megatron.posttrain.verifiers.reasoning import make_data

    settings = {}
    for pair in arguments.settings:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--with {pair}: write it as key=value, for example max_terms=3")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    paths = make_data(arguments.task, Path(arguments.output), arguments.train, arguments.test, arguments.seed, settings)
    print(*paths, sep="\n")
    return 0
