"""The `remit` command: thin; each subcommand calls the part of the package that does the work.

Nothing heavy is imported before a command needs it: torch and Megatron take seconds of processor time, and a mistake in
a recipe, or a look at a run, should not wait for them.
"""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remit_megatron import __version__
from remit_megatron.arguments import positive, shard
from remit_megatron.errors import RemitError, UserError
from remit_megatron.processes import while_read

TRAIN_EXTRA = {
    "huggingface_hub": "huggingface-hub",
    **{name: name for name in ("matplotlib", "orjson", "pyarrow", "rich", "safetensors", "tensorboard", "tokenizers")},
    "zstandard": "zstandard",
}
"""Modules of the extra `train`, which commands need and the plugin does not, and the package of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a RemitError into one line on stderr and its exit code."""
    return while_read(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        return int(arguments.func(arguments) or 0)
    except RemitError as error:
        if _speaks(error):
            print(f"remit: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        from remit_megatron.outside import quote

        print(f"remit: {quote(str(error.filename))}: {error.strerror}: choose a shorter one", file=sys.stderr)
        return UserError.exit_code
    except ModuleNotFoundError as error:
        package = TRAIN_EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            remedy = "pip install 'remit-megatron[train]'"
            print(f"remit: {package}, which this command needs, is not installed: {remedy}", file=sys.stderr)
        return UserError.exit_code


def build_parser() -> argparse.ArgumentParser:
    """All commands. The functions that they name import what they need when they run."""
    from data_prep import cli as data_cli
    from remit_megatron.analysis import cli as analysis_cli
    from remit_megatron.benchmark import cli as benchmark_cli
    from remit_megatron.convert import cli as convert_cli
    from remit_megatron.flywheel import cli as flywheel_cli
    from remit_megatron.posttrain import cli as post_cli

    parser = argparse.ArgumentParser(prog="remit", description="ReMiT mid-training on Megatron-Core.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_running(commands)
    _add_planning(commands)
    _add_launching(commands)
    analysis_cli.add_parser(commands)
    data_cli.add_parser(commands)
    convert_cli.add_parser(commands)
    benchmark_cli.add_parser(commands)
    flywheel_cli.add_parser(commands)
    post_cli.add_parser(commands)
    return parser


def _add_running(commands: Any) -> None:
    """What runs models: train, eval, score."""
    train = commands.add_parser("train", help="train a recipe, or go on with it")
    _add_recipe(train)
    train.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks")
    train.add_argument("--fallback", action="store_true", help="where the newest checkpoint is damaged, use an older")
    train.add_argument("--scorers", type=positive, metavar="N", help="and N ranks that score beside them")
    train.set_defaults(func=_train)

    evaluate = commands.add_parser("eval", help="held-out NLL and exact-match accuracy of a checkpoint")
    _add_recipe(evaluate)
    evaluate.add_argument("--checkpoint", required=True, help="checkpoint or run folder")
    evaluate.add_argument("--problems", help="jsonl with `prompt` and `answer`: greedy decoding, exact match")
    evaluate.add_argument("--max-new-tokens", type=positive, default=128)
    evaluate.add_argument("--output", help="write the figures as JSON here too")
    evaluate.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks")
    evaluate.set_defaults(func=_evaluate)

    score = commands.add_parser("score", help="the reference's scores of a recipe's samples, made ahead")
    _add_recipe(score)
    score.add_argument("--output", help="folder; default: reference.scores")
    score.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="only part I (from 0) of N")
    score.add_argument(
        "--check", type=positive, nargs="?", const=64, default=0, metavar="N", help="compare N samples, default 64"
    )
    score.add_argument(
        "--distribution", type=positive, metavar="K", help="keep the K most probable tokens too; reference.distribution"
    )
    score.add_argument("--export", metavar="DIR", help="write the scores by token, for `remit data select`")
    score.add_argument("--follow", action="store_true", help="score for the recipe's run while it trains")
    score.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks")
    score.set_defaults(func=_score)


def _add_planning(commands: Any) -> None:
    """What looks at a recipe or at this machine: check, plan, doctor."""
    check = commands.add_parser("check", help="validate a recipe and what it names; trains nothing")
    _add_recipe(check)
    check.add_argument("--ranks", type=positive, metavar="N", help="that it is to start on; default: the fewest")
    check.set_defaults(func=_check)

    plan = commands.add_parser("plan", help="memory and time that a recipe takes on so many GPUs")
    _add_recipe(plan)
    plan.add_argument("--gpus", type=positive, required=True, metavar="N")
    plan.add_argument("--gpu", default="H100", help="kind; default: H100")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is reached; default: 0.4")
    plan.set_defaults(func=_plan)

    doctor = commands.add_parser("doctor", help="versions, devices, and which optional parts are usable here")
    doctor.set_defaults(func=_doctor)


def _add_launching(commands: Any) -> None:
    """What starts runs elsewhere and looks at them: launch, status, sync-wandb."""
    launch = commands.add_parser("launch", help="start a recipe here, in a container, or on a SLURM cluster")
    _add_recipe(launch)
    launch.add_argument("--on", default="local", metavar="TARGET", help="local, docker[:PROFILE] or slurm[:PROFILE]")
    launch.add_argument("--nodes", type=positive, default=1, metavar="N")
    launch.add_argument("--nproc", type=positive, metavar="N", help="ranks a node, where the profile has no GPUs")
    launch.add_argument("--chain", type=positive, default=1, metavar="N", help="submit N jobs, one after the other")
    launch.add_argument("--dry-run", action="store_true", help="print what would be done, and ask sbatch about it")
    launch.add_argument("--follow", action="store_true", help="show the log until the job ends")
    launch.add_argument("--fallback", action="store_true", help="as of `remit train`")
    launch.set_defaults(func=_launch)

    status = commands.add_parser("status", help="what a run does, and why it was restarted")
    status.add_argument("run", help="run folder")
    status.set_defaults(func=_status)

    sync = commands.add_parser("sync-wandb", help="make one Weights & Biases run of a run's metrics.jsonl")
    sync.add_argument("run", help="run folder")
    sync.add_argument("--id", help="of the W&B run; default: the one in the checkpoint")
    sync.add_argument("--offline", action="store_true", help="into a folder that `wandb sync` sends later")
    sync.set_defaults(func=_sync_wandb)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe file (TOML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )


def _train(arguments: argparse.Namespace) -> int:
    from remit_megatron.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.nproc is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from remit_megatron.check import check_start

        check_start(recipe, arguments.nproc or 1)
    more = ["--fallback"] if arguments.fallback else []
    if arguments.scorers is not None:
        from launch.scorers import run_with_scorers

        command = [arguments.recipe, *_overrides(arguments)]
        return run_with_scorers(recipe, command, more, arguments.nproc, arguments.scorers)
    if arguments.nproc is not None:
        return _start_ranks(["train", arguments.recipe, *_overrides(arguments), *more], arguments.nproc, listens=True)
    from remit_megatron.train.loop import train

    train(recipe, fallback=arguments.fallback)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from remit_megatron.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.nproc is not None:
        command = ["eval", arguments.recipe, *_overrides(arguments), "--checkpoint", arguments.checkpoint]
        command += ["--max-new-tokens", str(arguments.max_new_tokens)]
        for flag in ("problems", "output"):
            if getattr(arguments, flag):
                command += [f"--{flag}", getattr(arguments, flag)]
        return _start_ranks(command, arguments.nproc)
    from remit_megatron.evaluate import evaluate_checkpoint

    evaluate_checkpoint(recipe, arguments.checkpoint, arguments.problems, arguments.max_new_tokens, arguments.output)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from remit_megatron.config import load_recipe

    if arguments.distribution is not None:
        arguments.overrides = [*arguments.overrides, f"reference.distribution={arguments.distribution}"]
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.follow and (arguments.output or arguments.check or arguments.export or arguments.shard != (0, 1)):
        raise UserError(
            "remit score --follow scores whole steps into reference.queue.folder: --output, --shard, --check and "
            "--export do not go with it"
        )
    if arguments.export:
        from remit_megatron.scores.export import export_scores

        print(*export_scores(recipe, arguments.output, arguments.export), sep="\n")
        return 0
    if arguments.nproc is not None:
        command = ["score", arguments.recipe, *_overrides(arguments), "--shard", "{}/{}".format(*arguments.shard)]
        command += ["--output", arguments.output] if arguments.output else []
        command += ["--check", str(arguments.check)] if arguments.check else []
        command += ["--follow"] if arguments.follow else []
        return _start_ranks(command, arguments.nproc, listens=arguments.follow)
    if arguments.follow:
        from remit_megatron.scores.follow import follow_run

        follow_run(recipe)
        return 0
    from remit_megatron.scores.score import score_recipe

    score_recipe(recipe, arguments.output, arguments.shard, arguments.check)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from remit_megatron.check import check_recipe
    from remit_megatron.config import load_recipe

    print(check_recipe(load_recipe(arguments.recipe, arguments.overrides), arguments.ranks))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from remit_megatron.config import load_recipe
    from remit_megatron.plan import plan

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(plan(recipe, arguments.gpus, arguments.gpu, arguments.mfu))
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from launch.submit import Request, launch

    return launch(
        Request(
            recipe=arguments.recipe,
            overrides=tuple(arguments.overrides),
            target=arguments.on,
            nodes=arguments.nodes,
            nproc=arguments.nproc,
            chain=arguments.chain,
            dry_run=arguments.dry_run,
            follow=arguments.follow,
            fallback=arguments.fallback,
        )
    )


def _status(arguments: argparse.Namespace) -> int:
    from launch.status import report

    print(report(Path(arguments.run)))
    return 0


def _sync_wandb(arguments: argparse.Namespace) -> int:
    from remit_megatron.train.loggers import sync_wandb

    print(sync_wandb(Path(arguments.run), arguments.id, "offline" if arguments.offline else "online"))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from remit_megatron.doctor import report

    print(report())
    return 0


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return [part for override in arguments.overrides for part in ("--set", override)]


def _start_ranks(command: list[str], nproc: int, *, listens: bool = False) -> int:
    from launch.command import remit
    from launch.local import run_local

    return run_local(remit(command), nproc, listens=listens)


def _quiet_libraries() -> None:
    """Megatron-Core and torch warn of optional parts, which `remit doctor` tells of, and of their own future, at times
    in the name of mcore/, which calls them.

    Python's -W or PYTHONWARNINGS brings their warnings back.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron|torch|remit_megatron\.mcore)\.")


def _speaks(error: RemitError) -> bool:
    """Whether this rank reports the error: alone, or the first of several that stopped with it."""
    if error.first_to_say is not None:
        return error.first_to_say
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":  # required: the checkpoint writer may start a spawned process
    sys.exit(main())
