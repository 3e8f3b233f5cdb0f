"""The commands `remit analyze tokens | runs`."""

import argparse
from pathlib import Path
from typing import Any

from remit_megatron.arguments import count, positive
from remit_megatron.errors import UserError


def add_parser(commands: Any) -> None:
    """Add `analyze` to the subcommands of `remit`."""
    parser = commands.add_parser("analyze", help="what a reference is surer of; how runs compare")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    one = actions.add_parser("tokens", help="margins, KL and weights of held-out tokens under several models")
    one.add_argument("recipe", help="recipe file (TOML): held-out sets, layout, precision")
    one.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    one.add_argument("--reference", metavar="CHECKPOINT", help="default: the recipe's reference.path")
    one.add_argument("--models", nargs="+", required=True, metavar="NAME=CHECKPOINT", help="compared with it")
    one.add_argument("--on", metavar="NAME", help="held-out set in data.eval; default: the first")
    one.add_argument("--samples", type=positive, default=64, metavar="N", help="of the set; default: 64")
    one.add_argument("--show", type=count, default=4, metavar="N", help="samples as coloured text; default: 4")
    one.add_argument("--output", required=True, metavar="FOLDER")
    one.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks")
    one.set_defaults(func=_tokens)

    two = actions.add_parser("runs", help="tokens and device hours to a baseline's quality, speed, gradient norms")
    two.add_argument("baseline", metavar="RUN", help="run folder")
    two.add_argument("runs", nargs="+", metavar="RUN", help="run folders that are compared with it")
    two.add_argument("--metric", required=True, help="key of metrics.jsonl, such as eval/NAME/nll; or of --results")
    two.add_argument("--target", type=float, help="value to reach; default: the baseline's last")
    two.add_argument("--better", choices=["lower", "higher"], help="default: as the metric's name tells")
    two.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="of `remit benchmark --kept`: metrics such as benchmark/base/average and benchmark/base/GSM8K",
    )
    two.add_argument("--output", required=True, metavar="FOLDER")
    two.set_defaults(func=_runs)


def _tokens(arguments: argparse.Namespace) -> int:
    from remit_megatron.config import load_recipe

    models = _named(arguments.models)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.nproc is not None:
        from launch.command import remit
        from launch.local import run_local

        command = ["analyze", "tokens", arguments.recipe, "--models", *arguments.models, "--output", arguments.output]
        command += ["--samples", str(arguments.samples), "--show", str(arguments.show)]
        command += [part for override in arguments.overrides for part in ("--set", override)]
        command += [
            part for flag in ("reference", "on") if (value := getattr(arguments, flag)) for part in (f"--{flag}", value)
        ]
        return run_local(remit(command), arguments.nproc)
    from remit_megatron.analysis.tokens import analyze_tokens

    analyze_tokens(
        recipe,
        reference=arguments.reference,
        models=models,
        set_name=arguments.on,
        samples=arguments.samples,
        show=arguments.show,
        output=Path(arguments.output),
    )
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from remit_megatron.analysis.runs import write_runs

    runs = [Path(run) for run in (arguments.baseline, *arguments.runs)]
    output = Path(arguments.output)
    results = [Path(folder) for folder in arguments.results]
    print(write_runs(runs, arguments.metric, output, target=arguments.target, better=arguments.better, results=results))
    return 0


def _named(models: list[str]) -> dict[str, str]:
    """NAME=CHECKPOINT of each. Raises UserError for another form, a name twice, and the name `reference`."""
    named: dict[str, str] = {}
    for one in models:
        name, equals, path = one.partition("=")
        if not (equals and path and name.replace("-", "").replace("_", "").isalnum()):
            raise UserError(f"--models {one}: write it as NAME=CHECKPOINT, the name of letters, digits, - and _")
        if name in named or name == "reference":
            raise UserError(f"--models {one}: the name '{name}' is taken: choose another")
        named[name] = path
    return named
