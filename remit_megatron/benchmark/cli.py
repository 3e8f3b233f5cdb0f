"""The command `remit benchmark`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from remit_megatron.arguments import positive
from remit_megatron.benchmark.suite import SUITES
from remit_megatron.errors import RunError, UserError
from remit_megatron.outside import quote

BATCH_SIZES = {"hf": "8", "vllm": "auto"}
"""Defaults by backend."""


def add_parser(commands: Any) -> None:
    """Add `benchmark` to the subcommands of `remit`."""
    parser = commands.add_parser("benchmark", help="the paper's downstream evaluation, by lm-evaluation-harness")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="Hugging Face folder or hub id, checkpoint or run folder"
    )
    parser.add_argument("--suite", choices=sorted(SUITES), help="base: Tables 1 and 2; post: 3 and 4")
    parser.add_argument("--output", metavar="FOLDER", help="results.json and logs; again: goes on where it stopped")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="only these benchmarks of the suite")
    parser.add_argument(
        "--like", metavar="HF_FOLDER", help="of a checkpoint: where config and tokenizer are taken from"
    )
    parser.add_argument(
        "--kept", action="store_true", help="of a run: each checkpoint that it keeps, into FOLDER/step-N"
    )
    parser.add_argument("--backend", choices=sorted(BATCH_SIZES), default="hf", help="of lm_eval; default: hf")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="another interpreter with lm_eval")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N items a task: not comparable, for trials")
    parser.add_argument("--include-path", metavar="DIR", help="lm_eval task files, for data on this machine")
    parser.add_argument("--device", help="as of lm_eval; default: the first GPU, or the CPU where there is none")
    parser.add_argument("--batch-size", metavar="N", help="a number, or auto; default: 8 with hf, auto with vllm")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the code that the model writes, here")
    parser.add_argument(
        "--set-model-args", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of lm_eval's model class"
    )
    parser.add_argument(
        "--set-gen-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of generation, such as max_gen_toks=1024 (lm_eval's default where a task says none: 256)",
    )
    parser.add_argument("--table", nargs="+", metavar="FOLDER", help="print results beside the paper's; runs nothing")
    parser.set_defaults(func=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> int:
    from remit_megatron.benchmark.table import table

    if arguments.table:
        if arguments.model is not None or arguments.output is not None:
            raise UserError(
                "remit benchmark --table prints results that are there: MODEL and --output do not go with it"
            )
        print(table([Path(folder) for folder in arguments.table]))
        return 0
    lacking = [name for name in ("MODEL", "--suite", "--output") if not getattr(arguments, name.lower().lstrip("-"))]
    if lacking:
        raise UserError(f"remit benchmark needs {', '.join(lacking)}; or --table FOLDER")
    from remit_megatron.benchmark.harness import Settings
    from remit_megatron.benchmark.run import Request, benchmark, of_kept

    output = Path(arguments.output)
    settings = Settings(
        backend=arguments.backend,
        python=arguments.python,
        chat=SUITES[arguments.suite].chat,
        model_args=_pairs(arguments.set_model_args, "--set-model-args"),
        gen_kwargs=_pairs(arguments.set_gen_kwargs, "--set-gen-kwargs"),
        limit=arguments.limit,
        include_path=_folder(arguments.include_path),
        device=arguments.device,
        batch_size=_batch_size(arguments.batch_size, arguments.backend),
    )
    request = Request(
        model=arguments.model,
        suite=arguments.suite,
        output=output,
        tasks=tuple(arguments.tasks),
        settings=settings,
        allow_code=arguments.allow_code_execution,
        like=arguments.like,
    )
    requests = of_kept(request) if arguments.kept else [request]
    failed = [name for each in requests for name in benchmark(each)]
    print(table([each.output for each in requests]))
    if failed:
        raise RunError(f"{len(failed)} tasks failed ({', '.join(failed)}); the same command tries them again")
    return 0


def _pairs(pairs: list[str], option: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key == "pretrained":
            raise UserError(f"{option} '{quote(pair)}': KEY=VALUE is expected, and no other model")
        try:
            found[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[key] = value
    return found


def _folder(name: str | None) -> Path | None:
    if name is None:
        return None
    folder = Path(name)
    for link in (path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()):
        if any(path.suffix == ".yaml" for _, _, files in os.walk(link) for path in map(Path, files)):
            raise UserError(
                f"--include-path {name}: lm_eval does not follow the link {link}, and would leave its tasks out: name "
                "that folder, or put the files there"
            )
    if other := sorted(folder.rglob("*.yml")):
        raise UserError(f"--include-path {name}: lm_eval reads .yaml alone, and would leave {other[0]} out: rename it")
    if not any(folder.rglob("*.yaml")):
        raise UserError(f"--include-path {name}: is no folder with task files (*.yaml)")
    return folder.absolute()


def _batch_size(text: str | None, backend: str) -> str:
    if text is None:
        return BATCH_SIZES[backend]
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UserError(f"--batch-size {text}: a number of at least 1 or auto is expected")
    return text
