"""`remit data`: from raw text to verified datasets. Every subcommand imports what it needs when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from remit_megatron.arguments import count, positive, shard


def add_parser(subparsers: Any) -> None:
    """Add `data` and its subcommands to an argparse subparsers object; each sets `func(arguments) -> int`."""
    data = subparsers.add_parser(
        "data", help="prepare datasets: tokenize, verify, stats, peek, merge, mix, index, select"
    )
    commands = data.add_subparsers(metavar="COMMAND", required=True)
    _add_tokenize(commands)
    _add_inspection(commands)
    _add_merge(commands)
    _add_recipe_commands(commands)
    _add_select(commands)


def main() -> int:
    """Entry point of `python -m data_prep.cli`, for workers and job arrays that need no training stack."""
    from remit_megatron.errors import RemitError
    from remit_megatron.processes import while_read

    def run() -> int:
        parser = argparse.ArgumentParser(prog="remit")
        add_parser(parser.add_subparsers(required=True))
        arguments = parser.parse_args()
        try:
            return int(arguments.func(arguments) or 0)
        except RemitError as error:
            print(f"remit: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    return while_read(run)


def _add_tokenize(commands: Any) -> None:
    parser = commands.add_parser("tokenize", help="raw text to a tokenized dataset; start it again to resume")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, glob, folder or hf:NAME[@CONFIG][:SPLIT]")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, or a folder with one")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .manifest.json")
    parser.add_argument("--workers", type=positive, help="processes; default: the CPUs this process may use")
    parser.add_argument("--text-key", default="text", help="key or column of the text; default: text")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the EOD token")
    parser.add_argument(
        "--eod-token", help="the EOD token; default: eos_token of the tokenizer's tokenizer_config.json"
    )
    parser.add_argument("--vocab-size", type=positive, help="rows of the model's vocabulary, where more than the ids")
    parser.add_argument("--text-lines", action="store_true", help="in plain text a line is a document, not a file")
    parser.add_argument("--max-bad", type=count, default=1000, help="unreadable documents to put aside; default: 1000")
    parser.add_argument(
        "--max-document-mib", type=positive, help="longer ones are put aside; default: 64, or 2 where memory needs it"
    )
    parser.add_argument("--backend", choices=("auto", "gigatoken", "tokenizers"), default="auto")
    parser.add_argument(
        "--skip-unknown", action="store_true", help="leave out files of a kind that is not read, and say which"
    )
    parser.add_argument("--shard", type=shard, metavar="I/N", help="only piece I (from 0) of N, for job arrays")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")
    parser.set_defaults(func=_tokenize)


def _add_inspection(commands: Any) -> None:
    verify = commands.add_parser("verify", help="check a dataset; exit code 2 with the reason where it is damaged")
    verify.add_argument("prefix", metavar="PREFIX")
    verify.add_argument("--full", action="store_true", help="read and hash everything")
    verify.add_argument("--adopt", action="store_true", help="after a full check write the missing manifest")
    verify.add_argument("--vocab-size", type=positive, help="refuse ids past this vocabulary")
    verify.add_argument("--tokenizer", help="refuse data of another tokenizer; with --adopt: record this one")
    verify.add_argument("--eod-id", type=int, help="with --adopt: the token that ends each document (checked)")
    verify.set_defaults(func=_verify)

    stats = commands.add_parser("stats", help="counts and lengths of a dataset as JSON")
    stats.add_argument("prefix", metavar="PREFIX")
    stats.set_defaults(func=_stats)

    peek = commands.add_parser("peek", help="token ids and text of one document")
    peek.add_argument("prefix", metavar="PREFIX")
    peek.add_argument("--doc", type=int, required=True, metavar="N", help="number of the document, from 0")
    peek.add_argument("--tokenizer", help="tokenizer.json or a folder with one, for the text")
    peek.add_argument("--tokens", type=positive, default=256, help="ids to show at most; default: 256")
    peek.set_defaults(func=_peek)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="join datasets of one tokenizer, in the order given")
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")
    parser.set_defaults(func=_merge)


def _add_recipe_commands(commands: Any) -> None:
    mix = commands.add_parser("mix", help="tokens and epochs that each source gives a run")
    index = commands.add_parser("index", help="build a recipe's sample indices ahead of the run")
    for parser, function in ((mix, _mix), (index, _index)):
        parser.add_argument("recipe", help="recipe file (TOML)")
        parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
        parser.set_defaults(func=function)
    mix.add_argument("--json", action="store_true", help="figures as JSON")


def _add_select(commands: Any) -> None:
    parser = commands.add_parser("select", help="MiniPLM's difference sampling: keep the best share of samples")
    parser.add_argument("prefix", metavar="PREFIX", help="dataset whose documents were scored")
    parser.add_argument("--large", required=True, help=".npy of NLL by the large model, nats, one value a document")
    parser.add_argument("--small", required=True, help=".npy of NLL by the small model, nats, one value a document")
    parser.add_argument("--keep", type=float, default=0.8, help="share to keep; default: 0.8")
    parser.add_argument("--by", choices=("documents", "tokens"), default="documents", help="what --keep is a share of")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")
    parser.set_defaults(func=_select)


def _tokenize(arguments: argparse.Namespace) -> int:
    from data_prep.tokenize import TokenizeSettings, tokenize

    fields = ("inputs", "tokenizer", "output", "workers", "text_key", "append_eod", "eod_token", "vocab_size",
              "text_lines", "max_bad", "max_document_mib", "backend", "shard", "overwrite", "skip_unknown")  # fmt: skip
    tokenize(TokenizeSettings(**{name: getattr(arguments, name) for name in fields}))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from data_prep.inspect import verify

    for line in verify(
        arguments.prefix,
        full=arguments.full,
        adopt=arguments.adopt,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        eod_id=arguments.eod_id,
    ):
        print(line)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from data_prep.inspect import stats

    print(json.dumps(stats(arguments.prefix), indent=1))
    return 0


def _peek(arguments: argparse.Namespace) -> int:
    from data_prep.inspect import peek

    print(peek(arguments.prefix, arguments.doc, tokenizer=arguments.tokenizer, max_tokens=arguments.tokens))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from data_prep.merge import merge

    manifest = merge(arguments.prefixes, arguments.output, overwrite=arguments.overwrite)
    print(f"{arguments.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return 0


def _mix(arguments: argparse.Namespace) -> int:
    from data_prep.mix import mix, table
    from remit_megatron.config import load_recipe

    shares = mix(load_recipe(arguments.recipe, arguments.overrides))
    print(json.dumps([share.record() for share in shares], indent=1) if arguments.json else table(shares))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from data_prep.mix import build_indices
    from remit_megatron.config import load_recipe

    for line in build_indices(load_recipe(arguments.recipe, arguments.overrides)):
        print(line)
    return 0


def _select(arguments: argparse.Namespace) -> int:
    from data_prep.select import select

    report = select(
        arguments.prefix,
        large=Path(arguments.large),
        small=Path(arguments.small),
        keep=arguments.keep,
        by=arguments.by,
        output=arguments.output,
        overwrite=arguments.overwrite,
    )
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
