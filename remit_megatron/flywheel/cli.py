"""The commands `remit flywheel run | status | report`."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `flywheel` to the subcommands of `remit`."""
    parser = commands.add_parser("flywheel", help="mid-training, post-training, and again, from one file")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    run = actions.add_parser("run", help="run the stages that are not done, or go on with them")
    _add_file(run)
    run.add_argument("--until", metavar="STAGE", help="only this stage and what it is made from")
    run.add_argument("--on", default="local", metavar="TARGET", help="local, docker[:PROFILE] or slurm[:PROFILE]")
    run.add_argument("--dry-run", action="store_true", help="under SLURM: print the job scripts")
    run.add_argument("--only", metavar="STAGE", help="one stage, by name or folder, whose parents are done")
    run.add_argument("--prepare", action="store_true", help="of --only: what comes before the training")
    run.set_defaults(func=_run)

    status = actions.add_parser("status", help="each stage: done, running, stopped, stale or to do, and why")
    _add_file(status)
    status.set_defaults(func=_status)

    report = actions.add_parser("report", help="a page with the figures of every stage")
    _add_file(report)
    report.add_argument("--output", metavar="FILE", help="default: report.html in the wheel's folder")
    report.set_defaults(func=_report)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wheel", metavar="WHEEL", help="the wheel's file (TOML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )


def _run(arguments: argparse.Namespace) -> int:
    from remit_megatron.flywheel.config import load_wheel
    from remit_megatron.flywheel.places import run_at

    wheel = load_wheel(Path(arguments.wheel), arguments.overrides)
    return run_at(
        Path(arguments.wheel),
        wheel,
        overrides=arguments.overrides,
        target=arguments.on,
        until=arguments.until,
        only=arguments.only,
        prepare=arguments.prepare,
        dry_run=arguments.dry_run,
    )


def _status(arguments: argparse.Namespace) -> int:
    from remit_megatron.flywheel.config import load_wheel
    from remit_megatron.flywheel.graph import make_plan
    from remit_megatron.flywheel.run import open_contents
    from remit_megatron.flywheel.table import table

    wheel = load_wheel(Path(arguments.wheel), arguments.overrides)
    contents = open_contents(wheel)
    print(table(make_plan(wheel, contents), contents))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from remit_megatron.flywheel.config import load_wheel
    from remit_megatron.flywheel.graph import make_plan
    from remit_megatron.flywheel.report import write_report
    from remit_megatron.flywheel.run import open_contents

    wheel = load_wheel(Path(arguments.wheel), arguments.overrides)
    contents = open_contents(wheel)
    plan = make_plan(wheel, contents)
    print(write_report(plan, contents, Path(arguments.output or wheel.folder / "report.html")))
    return 0
